"""Four tasks far from pre-training, as VTAB-1K folders: where, how many, which way, how far apart.

    python benchmarks/structured.py FOLDER
    mdpd train --task vtab/position --data FOLDER --backbone …

Shapes of random colours and sizes on dark ground, in the manner of dSprites and CLEVR, where a
frozen encoder's features say little: 800 + 200 training and 3,000 test pictures of 96 pixels a task,
the same bytes for the same Pillow and NumPy.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE, EDGE = 96, 8  # pixels of a picture, and those at its edge that no centre lies in
TRAIN, VALIDATION, TEST = 800, 200, 3000
SQUARE, STAR, ELLIPSE = range(3)
Draw = ImageDraw.ImageDraw
Random = np.random.Generator


def outline(kind: int, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius 1 around the origin, turned by an angle."""
    if kind == ELLIPSE:
        points = [(math.cos(t), 0.5 * math.sin(t)) for t in np.linspace(0, math.tau, 24)]
    else:
        corners, inner = (4, 1.0) if kind == SQUARE else (10, 0.45)
        points = [
            (
                (inner if k % 2 else 1.0) * math.cos(angle),
                (inner if k % 2 else 1.0) * math.sin(angle),
            )
            for k in range(corners)
            for angle in (math.tau * k / corners,)
        ]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def place(
    draw: Draw, rng: Random, x: float, y: float, radius: float,
    kind: int | None = None, turn: float | None = None,
) -> None:  # fmt: skip
    """Draw a shape of a random colour; kind and angle are random where they are not given."""
    kind = int(rng.integers(3)) if kind is None else kind
    turn = float(rng.uniform(0, math.tau)) if turn is None else turn
    colour = tuple(int(c) for c in rng.integers(120, 256, 3))
    draw.polygon([(x + radius * a, y + radius * b) for a, b in outline(kind, turn)], fill=colour)


def position(draw: Draw, rng: Random, label: int) -> None:
    """Draw one shape in one of 16 columns."""
    x = EDGE + (SIZE - 2 * EDGE) * (label + rng.random()) / 16
    place(draw, rng, x, rng.uniform(12, SIZE - 12), rng.uniform(6, 11))


def count(draw: Draw, rng: Random, label: int) -> None:
    """Draw one to eight shapes, which may overlap."""
    for _ in range(label + 1):
        place(draw, rng, *rng.uniform(EDGE, SIZE - EDGE, 2), rng.uniform(6, 9))


def orientation(draw: Draw, rng: Random, label: int) -> None:
    """Draw an ellipse in one of 16 directions of half a turn."""
    turn = math.pi * (label + rng.random()) / 16
    place(draw, rng, *rng.uniform(25, SIZE - 25, 2), rng.uniform(16, 24), ELLIPSE, turn)


def distance(draw: Draw, rng: Random, label: int) -> None:
    """Draw two shapes, their centres in one of 8 distances."""
    apart, turn = 16 + 48 * (label + rng.random()) / 8, rng.uniform(0, math.tau)
    dx, dy = apart / 2 * math.cos(turn), apart / 2 * math.sin(turn)
    x = rng.uniform(EDGE + abs(dx), SIZE - EDGE - abs(dx))
    y = rng.uniform(EDGE + abs(dy), SIZE - EDGE - abs(dy))
    place(draw, rng, x - dx, y - dy, rng.uniform(5, 8))
    place(draw, rng, x + dx, y + dy, rng.uniform(5, 8))


TASKS: dict[str, tuple[int, Callable[[Draw, Random, int], None]]] = {
    "position": (16, position),
    "count": (8, count),
    "orientation": (16, orientation),
    "distance": (8, distance),
}


def write_task(name: str, root: Path) -> None:
    """Write one task's folder: pictures, lists, and `classes.txt`."""
    classes, paint = TASKS[name]
    rng = np.random.default_rng([*name.encode()])
    folder = root / name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(TRAIN + VALIDATION + TEST):
        picture = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(0, 60, 3)))
        label = int(rng.integers(classes))
        paint(ImageDraw.Draw(picture), rng, label)
        path = f"images/{number:04}.png"
        picture.save(folder / path)
        lines.append(f"{path} {label}\n")
    known = TRAIN + VALIDATION
    for list_name, part in {
        "train800": lines[:TRAIN],
        "val200": lines[TRAIN:known],
        "train800val200": lines[:known],
        "test": lines[known:],
    }.items():
        (folder / f"{list_name}.txt").write_text("".join(part))
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in range(classes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    for name in TASKS:
        write_task(name, root)
        print(root / name)


if __name__ == "__main__":
    main()
