"""Synthetic chest radiographs with a known truth.

Each is computed from a patient's anatomy, the day's findings, an x-ray beam and a film. They are
the data of the built-in demo (`prepare.py demo`). Two images differ most in pose and exposure,
which the views of contrastive learning undo; what remains is mostly the findings.
"""
import math
from typing import Any

import numpy as np

FINDINGS = ("Cardiomegaly", "Lung Opacity", "Pleural Effusion", "Enlarged Cardiomediastinum")


def stream(seed, patient, page=0):
    """Random numbers for one purpose.

    Page 0 is a patient's anatomy, 1 + 2i the findings of image i, 2 + 2i its pose and exposure.
    A page does not depend on which others were drawn."""
    philox = np.random.Philox(key=[seed, patient], counter=[0, 0, 0, page])
    return np.random.Generator(philox)


def inside(distance, soft=0.012):
    """1 inside (distance > 0), 0 outside, with a linear edge, the penumbra of the beam.

    distance: to the edge; soft: the edge's width; both in thorax widths."""
    return np.clip(distance / soft + 0.5, 0, 1)


def dome(radius2):
    """Thickness of a round body along the ray: 1 at its middle, 0 at the rim.

    radius2: the squared distance from the middle, 1 at the rim."""
    return np.sqrt(np.clip(1 - radius2, 0, 1))


def patient_anatomy(seed, patient) -> dict[str, Any]:
    """What stays the same for a patient. Lengths in thorax widths (about 30 cm), tilt in degrees.

    Returns a dict of floats and `prone`, 4 booleans: the findings this patient is subject to."""
    rng = stream(seed, patient)
    return dict(
        # A finding that a patient is prone to is there on half of the days: prevalence 0.22.
        prone=rng.random(4) < 0.45,
        height=rng.uniform(0.76, 0.82),         # lung apex to the widest level of the cage
        base=rng.uniform(0.36, 0.40),           # v of the costophrenic angles
        dome=rng.uniform(0.12, 0.16),           # the diaphragm's height above those angles
        heart=rng.uniform(0.38, 0.44),          # cardiothoracic ratio, healthy below 0.5
        tilt=rng.uniform(30, 42),               # of the heart's long axis, down to its left
        mediastinum=rng.uniform(0.075, 0.09),   # half the width of the vessels in it
        rib_gap=rng.uniform(0.094, 0.1),        # from one rib to the next
        rib_phase=rng.uniform(0, 0.15),
        bone=rng.uniform(0.16, 0.20),           # attenuation of a rib
        habitus=rng.uniform(0.9, 1.15))         # soft tissue in the beam's way


def findings(seed, patient, image):
    """What an image shows: 4 booleans as in FINDINGS.

    Findings come and go between a patient's images."""
    today = stream(seed, patient, 1 + 2 * image).random(4) < 0.5
    return patient_anatomy(seed, patient)["prone"] & today


def phantom(seed, patient, image, size=256, found=None):
    """One frontal radiograph: (size, size) uint8, bright where the beam was stopped.

    `found`, 4 booleans, shows other findings than the image's own. Nothing else in the image
    changes, because the places of all findings are drawn, shown or not."""
    anatomy = patient_anatomy(seed, patient)
    rng = stream(seed, patient, 2 + 2 * image)
    u, v = pose(rng, size)
    if found is None:
        found = findings(seed, patient, image)
    return film(rng, matter(anatomy, rng, u, v, found))


def pose(rng, size):
    """How the patient stands before the detector: where each pixel lies in the patient's frame.

    u, v, both (size, size): u runs to the image's right (the patient's left), v down, both in
    thorax widths from the middle of the thorax. Pixels are computed there; none is resampled."""
    width = rng.uniform(0.55, 0.95)             # of the thorax, in image sides
    turn = math.radians(rng.uniform(-25, 25))
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = np.meshgrid(centres, centres)
    x = x - rng.uniform(-0.14, 0.14)
    y = y - rng.uniform(-0.14, 0.14)
    u = (math.cos(turn) * x + math.sin(turn) * y) / width
    v = (math.cos(turn) * y - math.sin(turn) * x) / width
    return u, v


def matter(anatomy, rng, u, v, found):
    """How much matter the beam meets at each point (u, v) of the chest.

    The torso, wider than the cage, with shoulders and a neck, less the air in the lungs, plus
    fluid and bones. Every possible finding draws its random numbers, present or not."""
    cardiomegaly, opacity, effusion, widened = found
    side = np.abs(u)

    # Thorax: an egg, widest from v = 0.2 down, round at the apices. The lungs fill it down to the
    # domes of the diaphragm; the liver lifts the right one.
    above = np.minimum(v - 0.2, 0) / anatomy["height"]
    cage = 0.5 * dome(above ** 2) ** 1.2 + 1e-3
    depth = dome((side / cage) ** 2)
    base = anatomy["base"] + rng.uniform(-0.02, 0.02)       # how deep a breath
    diaphragm = anatomy["dome"] * dome(((side - 0.24) / 0.27) ** 2)
    floor = base - diaphragm - 0.025 * (u < 0)
    lungs = inside(cage - side) * inside(floor - v)
    air = lungs * depth ** 0.6

    # Mediastinum: a column of vessels down to the heart, the aortic knob on the patient's left.
    wide = rng.uniform(0.12, 0.165)
    half = wide if widened else anatomy["mediastinum"]
    knob = 0.35 * half * np.exp(-((v + 0.2) / 0.07) ** 2) * (u > 0)
    air *= 1 - 0.75 * inside(half * (1 + 0.15 * np.cos(9 * v)) + knob - side, 0.03)

    # Heart: a tilted ellipse on the diaphragm, two thirds of it left of the spine, as wide
    # as its cardiothoracic ratio.
    enlarged = rng.uniform(0.54, 0.66)
    ratio = enlarged if cardiomegaly else anatomy["heart"]
    tilt = math.radians(anatomy["tilt"])
    long = 0.5 * ratio / math.hypot(math.cos(tilt), 0.74 * math.sin(tilt))
    hu = u - 0.17 * ratio
    hv = v - (base - 0.06 - 0.33 * ratio)
    along = math.cos(tilt) * hu + math.sin(tilt) * hv
    across = math.cos(tilt) * hv - math.sin(tilt) * hu
    radius2 = (along / long) ** 2 + (across / (0.74 * long)) ** 2
    air *= 1 - 0.85 * dome(radius2) ** 0.5

    # Hila: the vessels' roots in either lung.
    air *= 1 - 0.3 * np.exp(-((side - 0.13) / 0.06) ** 2 - ((v + 0.03) / 0.1) ** 2)

    # Lung opacity: a few soft puffs around one place in a lung.
    at_u = rng.choice([-1, 1]) * rng.uniform(0.2, 0.36)
    at_v = rng.uniform(-0.25, 0.15)
    reach = 0.6 * rng.uniform(0.08, 0.15)
    about = rng.normal(0, reach, (4, 2))
    if opacity:
        puffs = 0
        for du, dv in about:
            distance2 = (u - at_u - du) ** 2 + (v - at_v - dv) ** 2
            puffs = puffs + np.exp(-distance2 / (2 * reach ** 2))
        air *= 0.15 + 0.85 * np.exp(-1.5 * puffs)

    # Pleural effusion: fluid above the diaphragm. Its surface, a meniscus, climbs the chest wall
    # and blunts the angle. It is on one side, or less often on both.
    level = base - anatomy["dome"] - rng.uniform(0.02, 0.26)
    climb = rng.uniform(0.1, 0.18) * (side / cage) ** 4
    wet = u * rng.choice([-1, 1]) > rng.choice([-1, 0, 0])
    fluid = effusion * lungs * wet * inside(v - level + climb, 0.04)
    air *= 1 - fluid

    # Bones: ribs slope down from the spine. They are densest at the rim, where the beam runs along
    # them.
    turns = (v - 0.9 * side ** 2) / anatomy["rib_gap"] + anatomy["rib_phase"]
    ribs = np.cos(2 * np.pi * turns)
    ribs = np.clip(ribs + 0.2, 0, 1) * inside(cage + 0.03 - side) * inside(0.45 - v, 0.1)
    spine = inside(0.055 - side, 0.02) * (1 + 0.25 * np.cos(2 * np.pi * v / 0.085))
    clavicles = inside(0.016 - np.abs(v + 0.42 - 0.2 * side), 0.02)
    clavicles = clavicles * inside(0.2 - np.abs(side - 0.25), 0.04)

    # The sum.
    levels, widths = [-0.75, -0.62, -0.5, -0.3, 0.1], [0.17, 0.2, 0.6, 0.68, 0.6]
    torso = np.interp(v, levels, widths).astype(np.float32)     # half its width at each level
    flesh = 1.5 * anatomy["habitus"] * dome((side / torso) ** 2) ** 0.7
    total = flesh - 1.15 * air
    total += 0.15 * fluid               # water stops more than fat and bowel
    bones = anatomy["bone"] * (1.2 - 0.7 * depth) * ribs + 0.25 * spine + 0.3 * clavicles
    total += bones
    return total


def film(rng, total):
    """(H, W) of matter in the beam's way -> the image, (H, W) uint8."""
    # Beam: the photons that come through (Beer and Lambert), a little scatter, and noise that grows
    # with the square root of their number.
    photons = np.exp(-1.8 * total) + 0.01
    grain = rng.uniform(0.005, 0.02)
    noise = rng.standard_normal(total.shape, dtype=np.float32)
    photons += grain * np.sqrt(photons) * noise

    # Film: it darkens with the logarithm of the photons. Exposure and film decide from where and
    # how fast.
    brightness = rng.uniform(0.45, 0.75)
    contrast = rng.uniform(0.12, 0.26)
    gray = brightness - contrast * (np.log(np.maximum(photons, 1e-3)) + 1.7)
    return (255 * np.clip(gray, 0, 1)).astype(np.uint8)
