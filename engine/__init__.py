"""The pipeline and what a user touches: configuration, networks, scheduler, video, interfaces."""
