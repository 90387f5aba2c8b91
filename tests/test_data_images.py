"""Opening pictures safely, and checking all of them before training."""

import io
import re
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data import images
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.images import (
    FILE_FORMATS,
    PictureTooLarge,
    count_scans,
    decode_image,
    open_image,
)
from mdpd_deploy.data.load import load_task
from mdpd_deploy.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_colours(width: int = 8, height: int = 4) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def rgb(image: Image.Image, at: tuple[int, int]) -> Any:
    return image.getpixel(at)


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_reads_the_three_formats(tmp_path: Path, suffix: str) -> None:
    two_colours(32, 16).save(tmp_path / f"a.{suffix}")
    image = open_image(tmp_path / f"a.{suffix}")
    assert (image.mode, image.size) == ("RGB", (32, 16))
    assert rgb(image, (2, 2))[0] > 200 and rgb(image, (30, 2))[2] > 200


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert open_image(two_colours().convert(mode)).mode == "RGB"


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    two_colours(32, 16).save(tmp_path / "a.jpg", exif=exif)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == (16, 32)
    assert rgb(image, (8, 2))[0] > 200 and rgb(image, (8, 30))[2] > 200


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_only_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(tmp_path / name).getpixel((1, 1)) == RED


def test_the_picture_given_is_not_changed() -> None:
    grey = Image.new("L", (4, 4), 7)
    open_image(grey)
    assert grey.mode == "L"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edge", [6400, 9600, 14000])  # ours; where Pillow warns; where it refuses
def test_huge_pictures_are_refused_from_the_header(edge: int) -> None:
    with pytest.raises(UserError, match=r"^bomb\.png.* more than 40 million pixels"):
        decode_image(io.BytesIO(png_header_only(edge, edge)), "bomb.png")
    with pytest.raises(UserError, match="more than 40 million pixels"):
        open_image(Image.new("1", (6400, 6400)))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png cannot be opened \(No such file"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be opened"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable JPEG, PNG, WebP, TIFF, BMP or GIF"),
        (b"hello", "not a readable JPEG"),
        (b"GIF89a" + bytes(40), "not a readable JPEG"),
        (b"MM\0*" + bytes(40), "not a readable JPEG"),
        (b"BM" + bytes(60), "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.jpg is {words}"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("suffix", ["gif", "tif", "bmp"])
def test_some_formats_are_read_from_files_and_not_from_strangers(tmp_path: Path, suffix) -> None:
    frames = {"append_images": [Image.new("RGB", (8, 4))], "save_all": True}
    two_colours().save(tmp_path / f"x.{suffix}", **({} if suffix == "bmp" else frames))
    image = open_image(tmp_path / f"x.{suffix}")
    assert (image.mode, image.getpixel((1, 1)), image.getpixel((6, 1))) == ("RGB", RED, BLUE)
    sent = io.BytesIO((tmp_path / f"x.{suffix}").read_bytes())
    with pytest.raises(UserError, match="not a readable JPEG, PNG or WebP picture: convert it"):
        decode_image(sent, "sent")


def test_tiff_of_16_bits_is_scaled_and_one_without_a_known_white_is_refused(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 25700, 65535]])
    Image.fromarray(grey.astype("<u2")).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 1, 100, 255]
    for kind in (np.float32, np.int32):
        Image.fromarray(grey.astype(kind)).save(tmp_path / "b.tif")
        with pytest.raises(UserError, match=r"b\.tif holds floating-point or 32-bit values"):
            open_image(tmp_path / "b.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_truncated_pictures_are_refused_at_every_length(suffix: str) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    whole = stream.getvalue()
    for length in range(0, int(len(whole) * 0.9), max(1, len(whole) // 40)):
        with pytest.raises(UserError, match=r"^cut (is damaged|is not a readable)"):
            decode_image(io.BytesIO(whole[:length]), "cut", formats=FILE_FORMATS)


def test_flipped_bytes_never_escape_as_another_error() -> None:
    stream = io.BytesIO()
    two_colours(16, 16).save(stream, "png")
    whole = bytearray(stream.getvalue())
    for at in range(len(whole)):
        broken = bytes(whole[:at]) + bytes([whole[at] ^ 0xFF]) + bytes(whole[at + 1 :])
        try:
            decode_image(io.BytesIO(broken), "flip")
        except UserError as err:
            assert str(err).startswith("flip ")


def test_threads_see_the_same_limits() -> None:
    bomb, refused = png_header_only(9600, 9600), []

    def work() -> None:
        for _ in range(20):
            try:
                decode_image(io.BytesIO(bomb), "bomb")
            except UserError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 80


# --- time and memory ---------------------------------------------------------------------------


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", **options)
    return stream.getvalue()


def many_scans(count: int, edge: int = 64) -> bytes:
    """A sound progressive JPEG whose last scan comes again and again."""
    raw = jpeg(Image.new("RGB", (edge, edge), RED), progressive=True)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", raw)]
    return raw[:-2] + raw[starts[-1] : -2] * (count - len(starts)) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(PictureTooLarge, match=r"^x is a JPEG of more than 100 scans"):
        decode_image(io.BytesIO(many_scans(101)), "x")
    (tmp_path / "x.jpg").write_bytes(many_scans(20_000, edge=1000))  # minutes of work
    with pytest.raises(UserError, match=r"x\.jpg is a JPEG of more than 100 scans"):
        open_image(tmp_path / "x.jpg")
    assert open_image(_written(tmp_path, many_scans(100))).size == (64, 64)


def _written(folder: Path, raw: bytes) -> Path:
    (folder / "sound.jpg").write_bytes(raw)
    return folder / "sound.jpg"


def test_only_scans_count_as_scans() -> None:
    picture = two_colours(80, 60)
    raw = jpeg(picture, progressive=True, comment=b"\xff\xda" * 500)
    raw += b"\xff\xda" * 500  # a video may follow the picture
    assert count_scans(raw, 100) == count_scans(jpeg(picture, progressive=True), 100) == 10
    restarts = jpeg(two_colours(64, 64), restart_marker_blocks=1)
    assert b"\xff\xd0" in restarts and count_scans(restarts, 0) == 1
    assert [count_scans(many_scans(count), 100) for count in (12, 100, 101, 900)] == [
        12, 100, 101, 101
    ]  # fmt: skip
    for damaged in (
        b"\xff\xda" * 101,
        b"\xff\xda" * 200 + b"\xff" * 5000,
        b"\xff\xda\x00\x00" * 101,
    ):
        assert count_scans(damaged, 100) <= 101


def sixteen_bits(edge: int) -> bytes:
    stream = io.BytesIO()
    Image.new("I;16", (edge, edge), 25700).save(stream, "PNG")
    return stream.getvalue()


def test_sixteen_bits_are_scaled_in_little_memory(tmp_path: Path, run_python: Any) -> None:
    (tmp_path / "a.png").write_bytes(sixteen_bits(4000))
    done = run_python("-c", f"""
import resource
from pathlib import Path
from PIL import Image
from mdpd_deploy.data.images import open_image
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert open_image(Path({str(tmp_path / "a.png")!r})).getpixel((9, 9)) == (100,) * 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""")  # fmt: skip
    assert int(done.stdout) < 9 * 16_000_000 / 1024, done.stderr  # kB; float64 took 27 per pixel


def test_sixteen_bits_round_as_the_division_does() -> None:
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(open_image(Image.fromarray(grey)))[..., 0]
    np.testing.assert_array_equal(found, np.rint(grey / 257).astype(np.uint8))
    wide = Image.fromarray(np.array([[-5, 0, 65535, 70000]], dtype=np.int32))
    assert np.asarray(open_image(wide))[0, :, 0].tolist() == [0, 0, 255, 255]


STARVED = """
import io, resource, sys
from pathlib import Path
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.load import load_task
from mdpd_deploy.data.images import decode_image
from mdpd_deploy.errors import MdpdError
raws = [path.read_bytes() for path in map(Path, sys.argv[2:])]
config = DataConfig(path=sys.argv[1], bad_images="skip")
data = load_task("classify", config, seed=0)
decode_image(io.BytesIO(raws[0]), "x")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 70_000_000,) * 2)
for work in (*(lambda raw=raw: decode_image(io.BytesIO(raw), "x") for raw in raws[1:]),
             lambda: check_images(data, config)):
    try:
        print("fine", work())
    except MdpdError as err:
        print(type(err).__name__, err)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_too_little_memory_is_no_fault_of_the_pictures(tmp_path: Path, run_python: Any) -> None:
    sound = Image.new("RGB", (5000, 4000), RED)  # 80 MB
    for folder in ("train/a", "train/b", "validation/a", "validation/b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        two_colours().save(tmp_path / "data" / folder / "0.png")
    sound.save(tmp_path / "data" / "train" / "a" / "1.png")
    two_colours().save(tmp_path / "small.png")
    for name, options in (("a.jpg", {}), ("b.jpg", {"progressive": True}), ("c.png", {})):
        sound.save(tmp_path / name, **options)
    files = [tmp_path / name for name in ("small.png", "a.jpg", "b.jpg", "c.png")]
    done = run_python("-c", STARVED, tmp_path / "data", *files)
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["WorkFailed"] * 4, (said, done.stderr)
    assert all("the memory does not suffice to decode" in line for line in said)


def test_threads_decode_no_more_pixels_at_once_than_allowed(monkeypatch: Any) -> None:
    monkeypatch.setattr(images, "PIXELS_AT_ONCE", 250)
    at_once: list[int] = []

    def work() -> None:
        with images._in_turn(100):
            at_once.append(images._in_flight)
            threading.Event().wait(0.02)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(at_once) == 200 and images._in_flight == 0
    with images._in_turn(900):  # larger than all: alone
        assert images._in_flight == 900


# --- check_images ------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split, count in [("train", 4), ("validation", 2)]:
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                two_colours().save(folder / f"{i}.png")
    return tmp_path


def read(root: Path, **options: Any) -> tuple[Any, DataConfig]:
    config = DataConfig(path=str(root), **options)
    return load_task("classify", config, seed=0), config


def test_sound_pictures_pass_and_progress_is_told(pictures: Path) -> None:
    data, config = read(pictures)
    told: list[tuple[int, int]] = []
    assert check_images(data, config, lambda done, total: told.append((done, total))) == data
    assert told == [(i, 12) for i in range(1, 13)]


def test_text_tasks_have_nothing_to_check() -> None:
    data = replace(load_task("digits", DataConfig(limit=2), seed=0), fields=("text",))
    assert check_images(data, DataConfig()) is data


def test_stop_names_the_first_and_counts_all(pictures: Path) -> None:
    (pictures / "train" / "cat" / "1.png").write_bytes(b"no picture")
    (pictures / "train" / "dog" / "2.png").write_bytes(b"")
    data, config = read(pictures)
    with pytest.raises(UserError) as caught:
        check_images(data, config)
    assert "cat/1.png is not a readable" in str(caught.value)
    assert "2 of the 8 in train are bad" in str(caught.value)
    assert "data.bad_images=skip" in str(caught.value)


def test_skip_leaves_them_out_with_a_note(pictures: Path) -> None:
    (pictures / "train" / "cat" / "1.png").write_bytes(b"no picture")
    (pictures / "validation" / "dog" / "0.png").write_bytes(b"")
    data, config = read(pictures, bad_images="skip")
    clean: Any = check_images(data, config)
    assert [path.name for path in clean.train.inputs] == ["0.png", "2.png", "3.png"] + [
        f"{i}.png" for i in range(4)
    ]
    assert clean.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert len(clean.evaluation["validation"]) == 3
    assert len(clean.notes) == 2
    assert clean.notes[0].startswith("train: 1 of 8 pictures could not be read")
    assert "cat/1.png" in clean.notes[0] and "dog/0.png" in clean.notes[1]


def test_skip_stops_when_a_class_or_a_split_is_lost(pictures: Path) -> None:
    for i in range(4):
        (pictures / "train" / "cat" / f"{i}.png").write_bytes(b"")
    data, config = read(pictures, bad_images="skip")
    with pytest.raises(UserError, match="no training picture of the class 'cat' could be read"):
        check_images(data, config)
    for file in (pictures / "train" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 8 pictures in train could be read"):
        check_images(data, config)
