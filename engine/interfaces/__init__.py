"""What calls the pipeline for a user: the command line and its like. None owns a loop."""
