"""Which image is to blame when a batch fails, or never comes.

DALI ends the whole pipeline at one unreadable file, and its message often does not name the file.
The user needs that name, and within a bounded time.
"""
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from common import ImageError
from manifest import Manifest

# How long a batch may take, in seconds, before the run ends because a file cannot be read.
PATIENCE = 600


def blame_image(manifest: Manifest, in_flight: list, error: RuntimeError,
                load_alone: Callable[[int], object]) -> None:
    """Raise ImageError with the name of the image that broke the pipeline.

    in_flight: a tuple for each batch that DALI is busy with; the first item is its Work. Their
    images are read again one by one. If all of them can be read, this returns.
    load_alone(i) puts image i through DALI, and ends here again if that fails."""
    images = list(dict.fromkeys(i for work, _ in in_flight for i in work.all_images))
    for i in images:
        try:
            with Image.open(manifest.open(i)) as image:
                if manifest.listed and image.format != "JPEG":
                    raise OSError(f"a {image.format}, where prepare.py writes JPEG")
                image.load()
        except Exception as reason:         # a decoder may raise anything on a broken file
            raise ImageError(f"{manifest.name_in_message(i)} cannot be read: {reason}") from error

    # DALI fails on some damaged files that Pillow reads: give it each image alone.
    if "decoders.image" not in str(error) and "peek_image_shape" not in str(error):
        return
    if len(images) == 1:
        raise ImageError(f"{manifest.name_in_message(images[0])} cannot be read: its data is "
                         "damaged") from error
    for i in images:
        load_alone(i)


class Watch:
    """Ends the process, and names the image, if a batch takes longer than PATIENCE.

    A read may never return, for example if a file server is gone. Then DALI waits for it, no
    exception can be raised in this process, and the other processes wait for this one. Each batch
    is loaded `with` the watch. If DALI raises an error instead, it becomes an ImageError; see
    blame_image for the arguments."""

    def __init__(self, manifest: Manifest, in_flight: list, load_alone: Callable[[int], object]):
        self.manifest, self.in_flight, self.load_alone = manifest, in_flight, load_alone
        self.since = math.inf           # when DALI was asked for a batch; inf between batches
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, kind, error, traceback) -> None:
        self.since = math.inf
        if isinstance(error, RuntimeError):
            blame_image(self.manifest, self.in_flight, error, self.load_alone)

    def close(self) -> None:
        self.closed.set()

    def _watch(self) -> None:
        since, looks = math.inf, 0
        while not self.closed.wait(PATIENCE / 10):
            # Looks are counted instead of seconds, because a suspended process does not look.
            looks = looks + 1 if self.since == since < math.inf else 0
            since = self.since
            if looks >= 10:
                images = [i for work, _ in self.in_flight for i in work.all_images]
                silent = next((self.manifest.name_in_message(i) for i in images
                               if _never_read(self.manifest, i)), "an image")
                print(f"{Path(sys.argv[0]).name}: {silent} cannot be read: nothing has come of "
                      f"it for {PATIENCE:g} seconds", file=sys.stderr, flush=True)
                os._exit(1)


def _never_read(manifest: Manifest, i: int) -> bool:
    """Whether image i cannot be read within a few seconds. The thread that tries is left behind."""
    def read():
        with contextlib.suppress(Exception):        # a broken file has been read, too
            Image.open(manifest.open(i)).load()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(min(5, PATIENCE))
    return reader.is_alive()
