"""Random numbers as a function of seed and counter: NumPy's Philox, for many images at once.

Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a
key of two numbers and a counter of four into four random numbers. Nothing depends on what was
drawn before. NumPy has it, too, but needs a generator object for each counter, which is ten
times slower for a batch of images. The numbers are the same.
"""
import numpy as np

# What numbers are drawn for. Purpose and seed are the key, so that no two uses share a number.
SHUFFLE, VIEW, RESAMPLE, PARTNER = range(4)

# The multipliers of a round, and what is added to the two halves of the key after it.
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def generator(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    """NumPy's generator for one purpose and epoch, for numbers that belong to no single image."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, epoch]))


def uniform_numbers(key: tuple[int, int], count: int, *counter: np.ndarray | int) -> np.ndarray:
    """`count` numbers in [0, 1) for each counter, (count, ...) float64.

    key: seed and purpose. counter: three numbers, or arrays of them that broadcast to
    shape (...). Those of counter a, b, c are what NumPy's
    Generator(Philox(key, [0, a, b, c])) draws."""
    shape = np.broadcast_shapes(*map(np.shape, counter))
    # A counter gives a block of four numbers. NumPy counts up before it draws the first block.
    blocks = np.arange(1, 1 + (count + 3) // 4, dtype=np.uint64)                # (b,)
    blocks = blocks.reshape(-1, *[1] * len(shape))                              # (b, 1, ...)
    counters = np.broadcast_arrays(blocks, *(np.asarray(c, np.uint64) for c in counter))
    numbers = np.stack(_philox(key, counters), axis=1)                          # (b, 4, ...)
    numbers = numbers.reshape(-1, *shape)[:count]                               # 64 bits each
    return (numbers >> np.uint64(11)) * 2.0 ** -53


def _philox(key: tuple[int, int], c: list[np.ndarray] | tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Four counters of 64 bits -> four random numbers of 64 bits, element by element."""
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply(MULTIPLIERS[0], c[0])
        high1, low1 = _multiply(MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ np.uint64(key0), low1, high0 ^ c[3] ^ np.uint64(key1), low0]
        key0, key1 = (key0 + WEYL[0]) % 2**64, (key1 + WEYL[1]) % 2**64
    return list(c)


def _multiply(a: int, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of a * b, from the products of their halves."""
    a_low, a_high = np.uint64(a % 2**32), np.uint64(a >> 32)
    b_low, b_high = b & LOW, b >> HALF
    middle = a_high * b_low + (a_low * b_low >> HALF)
    carry = (middle & LOW) + a_low * b_high
    return a_high * b_high + (middle >> HALF) + (carry >> HALF), np.uint64(a) * b
