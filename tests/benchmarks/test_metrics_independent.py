"""PSNR and SSIM against scikit-image and torchmetrics: their numbers for drawn videos are stored here, so that
agreement is checked where neither is installed; where one is, the stored numbers are held against what it says now.

    python tests/benchmarks/test_metrics_independent.py    # with both: prints what is stored
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
from typing import Any

import numpy as np
import pytest

from solostep.benchmarks.video_metrics import compare, per_frame

VERSIONS = {"scikit-image": "0.26.0", "torchmetrics": "1.9.0"}
INDEPENDENT: dict[str, dict[str, Any]] = {
    "scikit-image": {
        "noise": {
            "psnr": [29.720274326186164, 29.674703926483478, 29.64477908324884, 29.744802410186285],
            "psnr_video": 29.695965829056608,
            "ssim_gaussian": [0.7094069680617575, 0.7068039106031639, 0.7047198501273918, 0.7097220859373158],
            "ssim_even": [0.778048621921541, 0.7761010033678556, 0.7741204240554774, 0.7782451373419947],
        },
        "shift": {
            "psnr": [28.28444976984464, 28.279594255533823, 28.269817305721332, 28.283733787878667],
            "psnr_video": 28.279394859622226,
            "ssim_gaussian": [0.9555050373492499, 0.9553495170709034, 0.9550169139794948, 0.9554794271121531],
            "ssim_even": [0.940175184068579, 0.9400282393749282, 0.9396149539305658, 0.9399246586776949],
        },
        "some": {
            "psnr": [math.inf, 20.80640255253872, math.inf, 20.78451356707901],
            "psnr_video": 23.805744226059975,
            "ssim_gaussian": [1.0, 0.23688783587233164, 1.0, 0.23613276694157717],
            "ssim_even": [1.0, 0.30717092177924354, 1.0, 0.3054670910032206],
        },
    },
    "torchmetrics": {
        "noise": {
            "psnr": [29.720273283525998, 29.674702885890355, 29.64477804401308, 29.744801366413544],
            "psnr_video": 29.695964787499058,
            "ssim_gaussian": [0.7094069680617552, 0.7068039106031625, 0.704719850127391, 0.709722085937315],
            "ssim_even": [0.7789303725051749, 0.7769871287160885, 0.7750133386509344, 0.7791267982137209],
        },
        "shift": {
            "psnr": [28.284448792312407, 28.279593278221828, 28.269816328852816, 28.283732810378908],
            "psnr_video": 28.27939388231928,
            "ssim_gaussian": [0.9555050373492462, 0.9553495170708995, 0.9550169139794932, 0.9554794271121512],
            "ssim_even": [0.9404387623365768, 0.9402929350432903, 0.9398819671044043, 0.940190345694799],
        },
        "some": {
            "psnr": [math.inf, 20.8064019142051, math.inf, 20.784512929738263],
            "psnr_video": 23.805743451678467,
            "ssim_gaussian": [1.0, 0.23688783587233103, 1.0, 0.23613276694157667],
            "ssim_even": [1.0, 0.3082759659516935, 1.0, 0.30656821444739696],
        },
    },
}
DIGESTS = {
    "noise": "6d2619bb517bf73ff16f0180165c9a559d4edd433b2450134e44cf74a71acbe1",
    "shift": "37182f721e58bdc44698bc8f3b2d29fcd5268fa806f8a483d7b8bec1164625f8",
    "some": "c707f84d1249b4e1e7986107882ece83bc9bf87c6758d36860ac1a5ed97af2d1",
}
"""SHA-256 of both videos: another generator of numbers would be seen, and not taken for another metric."""
ROUNDING = {"scikit-image": 1e-9, "torchmetrics": 5e-6}  # of PSNR: the latter takes its logarithm in fp32
NEAR = 1 / 6  # of what an SSIM lacks of 1: ffmpeg's windows are of 8x8 every 4 pixels, theirs of 7x7 at every pixel


def videos(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A video and its reference, uint8 [4, 72, 96, 3]. Whole numbers alone, and numpy's old generator, whose stream
    will not change: the same bytes everywhere."""
    t, y, x, c = np.ogrid[:4, :72, :96, :3]
    waves = [np.abs((x * 3 + t * 5 + c * 37) % 254 - 127), np.abs((y * 4 - t * 3 + c * 11) % 254 - 127)]
    reference = (waves[0] + waves[1]).astype(np.uint8)  # 0 to 254
    drawn = np.random.RandomState(7)
    if kind == "noise":
        made = reference + drawn.randint(-14, 15, reference.shape)
    elif kind == "shift":  # what a mode does that draws a scene a little elsewhere
        made = np.roll(reference, 3, axis=2) + drawn.randint(-2, 3, reference.shape)
    else:  # equal frames among others: their PSNR is infinite
        made = reference + drawn.randint(-40, 41, reference.shape) * (t % 2)
    return np.clip(made, 0, 255).astype(np.uint8), reference


KINDS = ("noise", "shift", "some")


def digest(kind: str) -> str:
    a, b = videos(kind)
    return hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest()


def by_scikit_image(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Frame by frame: PSNR, Wang's SSIM, and SSIM of even windows; PSNR of the whole video."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    own: dict[str, Any] = {"channel_axis": 2, "data_range": 255}
    pairs = list(zip(a, b, strict=True))
    with np.errstate(divide="ignore"):  # infinite for equal frames
        return {
            "psnr": [float(peak_signal_noise_ratio(y, x, data_range=255)) for x, y in pairs],
            "psnr_video": float(peak_signal_noise_ratio(b, a, data_range=255)),
            "ssim_gaussian": [float(structural_similarity(y, x, **wang, **own)) for x, y in pairs],
            "ssim_even": [float(structural_similarity(y, x, win_size=7, **own)) for x, y in pairs],
        }


def by_torchmetrics(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """The same; its SSIM pads the edge, so windows that reach over it are taken out of the full picture."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).double() for v in (a, b))
    own: dict[str, Any] = {"data_range": 255.0, "reduction": "none", "return_full_image": True}
    _, wang = structural_similarity_index_measure(x, y, **own)
    _, even = structural_similarity_index_measure(x, y, gaussian_kernel=False, kernel_size=7, **own)
    return {
        "psnr": peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).tolist(),
        "psnr_video": float(peak_signal_noise_ratio(x, y, data_range=255.0)),
        "ssim_gaussian": wang[..., 5:-5, 5:-5].mean((1, 2, 3)).tolist(),
        "ssim_even": even[..., 3:-3, 3:-3].mean((1, 2, 3)).tolist(),
    }


LIBRARIES = {"scikit-image": by_scikit_image, "torchmetrics": by_torchmetrics}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_our_numbers_are_theirs(library: str, kind: str) -> None:
    assert digest(kind) == DIGESTS[kind]
    a, b = videos(kind)
    theirs = INDEPENDENT[library][kind]
    found = per_frame(a, b, metrics=("psnr", "ssim_gaussian"))
    rounding = ROUNDING[library]
    assert found["psnr"] == pytest.approx(theirs["psnr"], abs=rounding)
    assert found["ssim_gaussian"] == pytest.approx(theirs["ssim_gaussian"], abs=1e-9)
    whole = compare(a, b, metrics=("psnr", "psnr_video"))
    assert whole["psnr_video"] == pytest.approx(theirs["psnr_video"], abs=rounding)
    assert whole["psnr"] == pytest.approx(np.mean([v for v in theirs["psnr"] if np.isfinite(v)]), abs=rounding)
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        ssim, even = (np.array(v) for v in (per_frame(a, b, metrics=("ssim",))["ssim"], theirs["ssim_even"]))
        assert (np.abs(ssim - even) <= NEAR * (1 - even) + 1e-9).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_stored_numbers_are_what_the_library_says(library: str) -> None:
    pytest.importorskip({"scikit-image": "skimage.metrics"}.get(library, library))
    for kind in KINDS:
        assert digest(kind) == DIGESTS[kind]
        now = LIBRARIES[library](*videos(kind))
        for name, value in INDEPENDENT[library][kind].items():
            assert now[name] == pytest.approx(value, abs=1e-6), (kind, name)


if __name__ == "__main__":
    print("VERSIONS =", json.dumps({name: importlib.metadata.version(name) for name in LIBRARIES}))
    made = {library: {kind: measure(*videos(kind)) for kind in KINDS} for library, measure in LIBRARIES.items()}
    print("INDEPENDENT: dict[str, dict[str, Any]] =", json.dumps(made).replace("Infinity", "math.inf"))
    print("DIGESTS =", json.dumps({kind: digest(kind) for kind in KINDS}))
