"""Synthetic chest radiographs with a known truth: a patient's anatomy, the day's findings, an x-ray beam and a film.

They are the built-in demo's data (`prepare.py demo`). What differs most between two images is the pose and the
exposure, which the views of contrastive learning undo; what is left is mostly the findings.
"""
import math

import numpy as np

FINDINGS = ("Cardiomegaly", "Lung Opacity", "Pleural Effusion", "Enlarged Cardiomediastinum")


def stream(seed, patient, page=0):
    """Random numbers for one purpose: page 0 a patient's anatomy, 1 + 2i the findings of image i, 2 + 2i its pose and
    exposure. Each page is the same whichever others were drawn."""
    return np.random.Generator(np.random.Philox(key=[seed, patient], counter=[0, 0, 0, page]))


def inside(distance, soft=0.012):
    """1 inside (distance > 0), 0 outside, a linear edge `soft` thorax widths wide: the penumbra of the beam."""
    return np.clip(distance / soft + 0.5, 0, 1)


def dome(radius2):
    """Thickness of a round body along the ray: 1 at its middle, 0 at the rim, where the squared radius is 1."""
    return np.sqrt(np.clip(1 - radius2, 0, 1))


def patient_anatomy(seed, patient):
    """What stays with a patient. Lengths are in thorax widths (about 30 cm), tilt in degrees.

    Returns a dict of floats and `prone`, 4 booleans: the findings this patient is subject to.
    """
    rng = stream(seed, patient)
    return dict(
        prone=rng.random(4) < 0.45,             # half of the days on which one could be there, it is: prevalence 0.22
        height=rng.uniform(0.76, 0.82),         # lung apex to the widest level of the cage
        base=rng.uniform(0.36, 0.40),           # level of the costophrenic angles, down from the middle of the thorax
        dome=rng.uniform(0.12, 0.16),           # height of the diaphragm's domes above those angles
        heart=rng.uniform(0.38, 0.44),          # cardiothoracic ratio, healthy below 0.5
        tilt=rng.uniform(30, 42),               # long axis of the heart, down towards the patient's left
        mediastinum=rng.uniform(0.075, 0.09),   # half the width of the vessels between the lungs
        rib_gap=rng.uniform(0.094, 0.1),        # from one rib to the next
        rib_phase=rng.uniform(0, 0.15),
        bone=rng.uniform(0.16, 0.20),           # attenuation of a rib
        habitus=rng.uniform(0.9, 1.15))         # soft tissue in the beam's way


def findings(seed, patient, image):
    """What is to be seen in an image: 4 booleans as in FINDINGS. Findings come and go between a patient's images."""
    return patient_anatomy(seed, patient)["prone"] & (stream(seed, patient, 1 + 2 * image).random(4) < 0.5)


def phantom(seed, patient, image, size=256, found=None):
    """One frontal radiograph: (size, size) uint8, bright where the beam was stopped.

    `found`, 4 booleans, shows other findings than its own: their places are drawn whether they are shown or not, and
    nothing else in the image changes.

    u runs to the image's right (the patient's left), v down, both in thorax widths from the middle of the thorax.
    """
    p, rng = patient_anatomy(seed, patient), stream(seed, patient, 2 + 2 * image)
    cardiomegaly, opacity, effusion, widened = findings(seed, patient, image) if found is None else found

    # Pose: how the patient stands before the detector. Each pixel is looked up in the patient's frame, none resampled.
    width, turn = rng.uniform(0.55, 0.95), math.radians(rng.uniform(-25, 25))     # thorax width in image sides
    x, y = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size - 0.5] * 2)
    x, y = x - rng.uniform(-0.14, 0.14), y - rng.uniform(-0.14, 0.14)
    u = (math.cos(turn) * x + math.sin(turn) * y) / width
    v = (math.cos(turn) * y - math.sin(turn) * x) / width
    side = np.abs(u)

    # Thorax: an egg, at its widest from v = 0.2 down, round at the apices. Lungs fill it down to the diaphragm's domes.
    cage = 0.5 * dome((np.minimum(v - 0.2, 0) / p["height"]) ** 2) ** 1.2 + 1e-3
    depth = dome((side / cage) ** 2)
    base = p["base"] + rng.uniform(-0.02, 0.02)                 # how deep a breath
    floor = base - p["dome"] * dome(((side - 0.24) / 0.27) ** 2) - 0.025 * (u < 0)      # the liver lifts the right one
    lungs = inside(cage - side) * inside(floor - v)
    air = lungs * depth ** 0.6

    # Mediastinum: a column of vessels down to the heart, with the aortic knob on the patient's left.
    wide = rng.uniform(0.12, 0.165)
    half = wide if widened else p["mediastinum"]
    knob = 0.35 * half * np.exp(-((v + 0.2) / 0.07) ** 2) * (u > 0)
    air *= 1 - 0.75 * inside(half * (1 + 0.15 * np.cos(9 * v)) + knob - side, 0.03)

    # Heart: a tilted ellipse on the diaphragm, two thirds of it left of the spine, as wide as its cardiothoracic ratio.
    enlarged = rng.uniform(0.54, 0.66)
    ratio, tilt = enlarged if cardiomegaly else p["heart"], math.radians(p["tilt"])
    long = 0.5 * ratio / math.hypot(math.cos(tilt), 0.74 * math.sin(tilt))
    hu, hv = u - 0.17 * ratio, v - (base - 0.06 - 0.33 * ratio)
    along, across = math.cos(tilt) * hu + math.sin(tilt) * hv, math.cos(tilt) * hv - math.sin(tilt) * hu
    air *= 1 - 0.85 * dome((along / long) ** 2 + (across / (0.74 * long)) ** 2) ** 0.5

    # Hila: the vessels' roots in either lung.
    air *= 1 - 0.3 * np.exp(-((side - 0.13) / 0.06) ** 2 - ((v + 0.03) / 0.1) ** 2)

    # Lung opacity: a few soft puffs about one place in a lung.
    at_u, at_v = rng.choice([-1, 1]) * rng.uniform(0.2, 0.36), rng.uniform(-0.25, 0.15)
    reach = 0.6 * rng.uniform(0.08, 0.15)
    about = rng.normal(0, reach, (4, 2))
    if opacity:
        puffs = sum(np.exp(-((u - at_u - du) ** 2 + (v - at_v - dv) ** 2) / (2 * reach ** 2)) for du, dv in about)
        air *= 0.15 + 0.85 * np.exp(-1.5 * puffs)

    # Pleural effusion: fluid above the diaphragm; its surface, a meniscus, climbs the chest wall and blunts the angle.
    level = base - p["dome"] - rng.uniform(0.02, 0.26)
    climb = rng.uniform(0.1, 0.18) * (side / cage) ** 4
    wet = u * rng.choice([-1, 1]) > rng.choice([-1, 0, 0])                          # both sides, or more often one
    fluid = effusion * lungs * wet * inside(v - level + climb, 0.04)
    air *= 1 - fluid

    # Matter in the beam's way: the torso, wider than the cage, with shoulders and a neck, less the air, plus the bones.
    # Ribs fall away from the spine and are densest at the rim, where the beam runs along them.
    torso = np.interp(v, [-0.75, -0.62, -0.5, -0.3, 0.1], [0.17, 0.2, 0.6, 0.68, 0.6]).astype(np.float32)
    matter = 1.5 * p["habitus"] * dome((side / torso) ** 2) ** 0.7 - 1.15 * air
    matter += 0.15 * fluid                                      # water stops more than the abdomen's fat and bowel
    ribs = np.cos(2 * np.pi * ((v - 0.9 * side ** 2) / p["rib_gap"] + p["rib_phase"]))
    ribs = np.clip(ribs + 0.2, 0, 1) * inside(cage + 0.03 - side) * inside(0.45 - v, 0.1)
    spine = inside(0.055 - side, 0.02) * (1 + 0.25 * np.cos(2 * np.pi * v / 0.085))
    clavicles = inside(0.016 - np.abs(v + 0.42 - 0.2 * side), 0.02) * inside(0.2 - np.abs(side - 0.25), 0.04)
    matter += p["bone"] * (1.2 - 0.7 * depth) * ribs + 0.25 * spine + 0.3 * clavicles

    # Beam: the photons that come through (Beer and Lambert), a little scatter, and noise as the root of their number.
    photons = np.exp(-1.8 * matter) + 0.01
    grain = rng.uniform(0.005, 0.02)
    photons += grain * np.sqrt(photons) * rng.standard_normal((size, size), dtype=np.float32)
    # Film: it darkens with the logarithm of the photons, by how much and from where is up to the exposure and the film.
    film = rng.uniform(0.45, 0.75) - rng.uniform(0.12, 0.26) * (np.log(np.maximum(photons, 1e-3)) + 1.7)
    return (255 * np.clip(film, 0, 1)).astype(np.uint8)
