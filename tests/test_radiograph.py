"""Files to gray images: which files are found, and whether each is read the right way up."""
import os
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import prepare
from common import DataError
from manifest import read_manifest
from radiograph import ImageSettings, find_files, load_image, read_image

RAMP = np.linspace(0, 1, 64 * 48).reshape(64, 48)       # dark above, bright below


def load(file):
    """(H, W), 0 to 1, of a file as it would be stored."""
    return np.asarray(load_image(file, read_image, ImageSettings()).image, float) / 255


def refusal(file):
    with pytest.raises(DataError) as error:
        load(file)
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# Gray levels.

def write_tiff(file, pixels, photometric, sample_format):
    """A TIFF without compression, in the byte order of `pixels` (H, W). photometric: 0 where white
    is 0, 1 where black is, None for a file that does not say. sample_format: 1 unsigned, 2 signed,
    3 floating point."""
    order, data = ">" if pixels.dtype.byteorder == ">" else "<", pixels.tobytes()
    height, width = pixels.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8 * pixels.itemsize), (259, 3, 1),
            (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, height),
            (279, 4, len(data)), (339, 3, sample_format)]
    tags = [tag for tag in tags if tag[2] is not None]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0))
        for tag, kind, value in tags)
    file.write_bytes((b"II*\0" if order == "<" else b"MM\0*")
                     + struct.pack(f"{order}I", 8 + len(data)) + data
                     + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("photometric, kind, sample_format, low, high", [
    (0, "u1", 1, 0, 255), (1, "u1", 1, 0, 255),
    (0, "<u2", 1, 0, 65535), (1, "<u2", 1, 100, 4000), (1, ">u2", 1, 0, 65535),
    (1, "<i2", 2, -2000, 3000), (1, ">i2", 2, -32768, 32767),
    (1, "<u4", 1, 0, 4e9), (1, "<i4", 2, -2e9, 2e9), (1, ">i4", 2, -7000, 2000),
    (0, "<f4", 3, 0, 1), (1, "<f4", 3, -1024, 3071), (0, ">f4", 3, 0, 1e6), (1, ">f4", 3, 0, 1),
])
def test_tiff_is_read_the_right_way_up(tmp_path, photometric, kind, sample_format, low, high):
    pixels = RAMP if photometric else 1 - RAMP
    write_tiff(tmp_path / "x.tif", (low + (high - low) * pixels).astype(kind), photometric,
               sample_format)
    assert np.abs(load(tmp_path / "x.tif") - RAMP).max() < 0.01


@pytest.mark.parametrize("photometric, kind, sample_format, words", [
    (None, "u1", 1, "PhotometricInterpretation is missing"),
    (None, "<u2", 1, "PhotometricInterpretation is missing"),
    (None, "<f4", 3, "PhotometricInterpretation is missing"),
    (1, "i1", 2, "signed gray levels of 8 bits"),
    (1, "<f8", 3, "of a kind of TIFF, PNG or JPEG that cannot be read"),
    (0, "<i2", 2, "of a kind of TIFF, PNG or JPEG that cannot be read"),
])
def test_tiff_that_is_not_read(tmp_path, photometric, kind, sample_format, words):
    write_tiff(tmp_path / "x.tif", (100 * RAMP).astype(kind), photometric, sample_format)
    assert words in refusal(tmp_path / "x.tif")


@pytest.mark.parametrize("photometric, kind, sample_format, words", [
    (1, "<f8", 3, "64 bits of floating point"), (1, ">f2", 3, "16 bits of floating point, big-end"),
    (0, "<i2", 2, "16 bits signed, white is 0"), (0, ">u2", 1, "16 bits, white is 0, big-endian"),
    (0, "i1", 2, "8 bits signed, white is 0"), (1, "<u8", 1, "64 bits"),
    (1, "<c8", 6, "64 bits complex"), (7, "<u2", 1, "16 bits")])
def test_kinds_of_tiff_are_named(tmp_path, photometric, kind, sample_format, words):
    write_tiff(tmp_path / "x.tif", (100 * RAMP).astype(kind), photometric, sample_format)
    assert f"that cannot be read (a TIFF of {words}" in refusal(tmp_path / "x.tif")
    assert "): save it as PNG" in refusal(tmp_path / "x.tif")
    for size in (4, 12, 4110):              # the tags are gone
        (tmp_path / "y.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:size])
        assert "of a kind of TIFF, PNG or JPEG that cannot be read" in refusal(tmp_path / "y.tif")


GRAY = Image.fromarray((255 * RAMP).astype(np.uint8))
DEEP = Image.fromarray((4095 * RAMP).astype(np.uint16))


@pytest.mark.parametrize("image, name, options", [
    (DEEP, "deep.png", {}), (DEEP, "deep.tif", {"compression": "tiff_lzw"}),
    (DEEP, "deep.jp2", {}), (DEEP, "deep.pgm", {}),
    (GRAY.convert("P"), "palette.png", {}), (GRAY.convert("P"), "palette.tif", {}),
    (GRAY.convert("RGBA"), "opaque.png", {}), (GRAY.convert("LA"), "opaque_gray.png", {}),
    (GRAY, "black_is_key.png", {"transparency": 0}),
    (GRAY.convert("CMYK"), "print.tif", {}), (GRAY.convert("CMYK"), "print.jpg", {}),
    (GRAY.convert("YCbCr"), "ycc.tif", {}), (GRAY.rotate(180), "turned.png", {"exif": 3}),
])
def test_every_kind_of_pixel_is_read(tmp_path, image, name, options):
    if "exif" in options:
        exif = Image.Exif()
        exif[274] = options["exif"]
        options = {"exif": exif}
    image.save(tmp_path / name, **options)
    assert np.abs(load(tmp_path / name) - RAMP).max() < 0.015


def with_alpha(image, alpha):
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("image, name, options, words", [
    (with_alpha(GRAY.convert("RGB"), np.uint8(RAMP * 255)), "x.png", {}, "transparent in part"),
    (with_alpha(Image.new("L", GRAY.size), np.uint8(RAMP * 255)), "x.png", {}, "transparent in"),
    (GRAY.convert("P"), "x.png", {"transparency": 0}, "transparent in part"),
    (GRAY, "x.tif", {"save_all": True, "append_images": [GRAY]}, "2 frames"),
    (Image.fromarray(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)), "x.tif", {},
     "some of its gray levels are infinite or no number"),
    (Image.fromarray(np.where(RAMP > 0.9, np.inf, RAMP).astype(np.float32)), "x.tif", {},
     "some of its gray levels are infinite or no number"),
    (GRAY, "x.png", {"format": "GIF"}, "a GIF, none of PNG, JPEG"),
    (GRAY.convert("RGB"), "x.jpg", {"format": "PDF"}, "a PDF, none of PNG, JPEG"),
])
def test_what_cannot_be_meant_is_refused(tmp_path, image, name, options, words):
    image.save(tmp_path / name, **options)
    assert words in refusal(tmp_path / name)


@pytest.mark.parametrize("content, words", [
    (b"", "an empty file"), (b"<!DOCTYPE html>", "a page of HTML"), (b"abc", "unknown, none of"),
    (bytes(128) + b"DICM", "a DICOM file"), (b"\x89PNG\r\n\x1a\n", "damaged, or of a kind"),
])
def test_files_that_are_no_images_are_called_what_they_are(tmp_path, content, words):
    (tmp_path / "x.png").write_bytes(content)
    assert words in refusal(tmp_path / "x.png")


# --------------------------------------------------------------------------------------------------
# Files.

@pytest.mark.parametrize("name, damage", [
    ("x.png", lambda content: content[:len(content) * 2 // 3]),
    ("x.jpg", lambda content: content[:len(content) * 2 // 3]),
    ("x.tif", lambda content: content[:len(content) * 2 // 3]),
    ("x.png", lambda content: content[:60] + bytes(20) + content[80:])])
def test_reasons_are_in_plain_words(tmp_path, name, damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    why = refusal(tmp_path / name)
    assert why.startswith(("damaged, or of a kind that cannot be read: ", "cannot identify"))
    assert "Error" not in why and not why.endswith(": ")


def test_colours_and_sizes_that_are_not_read_are_named(tmp_path):
    Image.new("LAB", (64, 64)).save(tmp_path / "x.tif")
    assert refusal(tmp_path / "x.tif").startswith("in the colours LAB, which are not read")
    Image.new("L", (1100, 1000)).save(tmp_path / "x.png")
    for most in (1, 0.5):
        with pytest.raises(DataError, match="^1100000 pixels are more than --max-megapixels$"):
            load_image(tmp_path / "x.png", read_image, ImageSettings(max_megapixels=most))


def test_special_files_are_found_and_never_opened(tmp_path):
    GRAY.save(tmp_path / "a.png")
    (tmp_path / "below").mkdir()
    GRAY.save(tmp_path / "below/b.png")
    (tmp_path / "._a.png").write_bytes(b"AppleDouble")
    (tmp_path / ".hidden").mkdir()
    GRAY.save(tmp_path / ".hidden/c.png")
    (tmp_path / "below/again").symlink_to(tmp_path)             # a circle
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "below/pipe.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
    assert find_files(tmp_path) == (
        ["a.png", "below/b.png", "nowhere.png"], ["below/pipe.png", "null.png", "socket.png"], [],
        ["._a.png", ".hidden"])
    for name in ("below/pipe.png", "null.png", "socket.png", "below"):
        assert "no file, but a named pipe" in refusal(tmp_path / name)


def test_special_files_and_long_names_are_listed_as_rejected(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    (src / "a").mkdir(parents=True)
    (src / ("f" * 255)).mkdir()
    for i in range(12):
        Image.fromarray(np.roll(np.asarray(GRAY), 5 * i, 0)).save(src / f"a/{i}.png")
    GRAY.save(src / "a" / ("x" * 251 + ".png"))
    GRAY.save(src / "a" / ("y" * 247 + ".png"))
    GRAY.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(src / ("f" * 255) / "0.png")
    os.mkfifo(src / "a/pipe.png")
    prepare.main(["folder", "--src", str(src), "--out", str(out), "--workers", "1",
                  "--allow", "odd-classes"])
    rejected = (out / "rejected.csv").read_text()
    assert "a/pipe.png,\"a named pipe, a socket or a device\"" in rejected
    assert f"a/{'x' * 251}.png,its name would be longer than 251 bytes" in rejected
    paths = read_manifest(out).paths
    assert len(paths) == 14 and f"images/a/{'y' * 247}.jpg" in paths
    assert f"images/{'f' * 255}/0.jpg" in paths


# --------------------------------------------------------------------------------------------------
# What is no radiograph, or hardly to be seen.

def test_masks_are_known_by_their_gray_levels(tmp_path):
    y, x = np.mgrid[:256, :256]
    lungs = (x - 80) ** 2 + (y - 120) ** 2 / 2 < 2500
    heart = (x - 170) ** 2 + (y - 160) ** 2 < 1600
    for i, mask in enumerate((lungs, np.uint8(255 * lungs), np.uint8(80 * lungs + 170 * heart),
                              np.uint16(9000 * lungs), np.uint8(255 * (heart & (y > 190))))):
        Image.fromarray(mask).save(tmp_path / f"{i}.png")
        assert "a mask or a drawing" in refusal(tmp_path / f"{i}.png")
    Image.fromarray(np.uint8(255 * lungs)).save(tmp_path / "x.jpg", quality=75)
    assert "a mask or a drawing" in refusal(tmp_path / "x.jpg")
    load_image(tmp_path / "x.jpg", read_image, ImageSettings(masks=True))
    # A radiograph may be black for the most part, or have few levels.
    seen = np.where(x < 200, 0, RAMP.repeat(4, 0)[:, :1] * 200)
    for pixels in (seen, np.round(RAMP * 20) * 10):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "x.png")
        load(tmp_path / "x.png")


def test_little_contrast_is_noted(tmp_path):
    pixels = (RAMP * 600).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png", read_image, ImageSettings()).notes == ()
    pixels[:4, :8] = 65535 - np.arange(8) * 800                        # a marker, 1 %
    Image.fromarray(pixels).save(tmp_path / "x.png")
    note, = load_image(tmp_path / "x.png", read_image, ImageSettings()).notes
    assert note.startswith("little contrast: a marker")
    stretched = ImageSettings(stretch=(0.5, 98))
    assert load_image(tmp_path / "x.png", read_image, stretched).notes == ()


def as_float(pixels):
    return Image.fromarray(pixels.astype(np.float32))


def as_16_bits(pixels):
    return Image.fromarray(pixels.astype(np.uint16))


@pytest.mark.parametrize("make, low, high, border, marker", [
    (as_16_bits, 30000, 33000, 0, None), (as_16_bits, 2000, 2600, 65535, None),
    (as_16_bits, 8000, 9000, 0, 65535), (as_float, -0.2, 0.7, -9999, None),
    (as_float, 0, 1, -3.4e38, None), (as_float, 100, 300, 1e20, -32768)])
@pytest.mark.parametrize("size", [256, 40])
def test_a_border_takes_no_gray_levels(tmp_path, make, low, high, border, marker, size):
    """Neither before the image is made smaller, which mixes the border with what is beside it."""
    pixels = low + (high - low) * np.broadcast_to(RAMP, (len(RAMP), RAMP.shape[1])).copy()
    pixels[:, :7] = border
    if marker is not None:
        pixels[:6, 20:26] = marker
    make(pixels).save(tmp_path / "x.tif")
    image, notes = load_image(tmp_path / "x.tif", read_image, ImageSettings(size=size))
    inside = np.asarray(image, float)[8:, 8:]
    assert np.ptp(inside) > 200 and inside.std() > 60
    assert [note.split(":")[0] for note in notes] == [
        "one level at an end of the range cut off"]


def test_a_black_background_of_a_wide_range_changes_nothing(tmp_path):
    pixels = (1600 + 2400 * np.broadcast_to(RAMP, (len(RAMP), RAMP.shape[1]))).astype(np.uint16)
    pixels[:, :20] = 0
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image, notes = load_image(tmp_path / "x.png", read_image, ImageSettings())
    assert notes == () and np.abs(
        np.asarray(image, int)[8:, 22:] - pixels[8:, 22:] * 255. / pixels.max()).max() < 4


@pytest.mark.parametrize("border, body, told", [
    (0, (225, 250), True), (255, (10, 40), True), (0, (60, 200), False), (0, (100, 170), False)])
def test_a_body_of_few_levels_inside_a_border_is_noted(tmp_path, border, body, told):
    pixels = np.interp(RAMP, (0, 1), body) + np.zeros((len(RAMP), 1))
    pixels[:, :9] = border
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "x.png")
    notes = load_image(tmp_path / "x.png", read_image, ImageSettings()).notes
    assert any("little contrast" in note for note in notes) == told


def test_a_worker_whose_parent_died_before_it_began_ends_itself():
    """The kernel's signal would never come, and the worker would wait for work without end."""
    script = "import os, common; common.end_with_parent(9, {}); print('alive')"
    for parent, code, output in (("os.getppid()", 0, "alive\n"), ("os.getppid() + 1", 1, "")):
        process = subprocess.run([sys.executable, "-c", script.format(parent)], cwd=ROOT,
                                 text=True, capture_output=True, timeout=60)
        assert (process.returncode, process.stdout) == (code, output), process.stderr
