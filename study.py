"""What finetune.py compares, and on which images, labels and draws of the patients.

Everything is read and checked before anything is written.
"""
import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

import run_folder
from checkpoint import FORMAT, CheckpointError, load_checkpoint, settings_of
from classifier import Classifier, first_layers
from common import DataError, plain_name
from dali_pipeline import Preprocessing
from flags import default_encoder
from labels import Draw, Task, draw, labels_required, make_task, policy_sentence
from manifest import Manifest, read_manifest
from manifest_csv import SPLITS
from model import build_encoder
from probe import PROBE_CELLS, counted_labels
from run import Compute
from scores import val_score

if TYPE_CHECKING:
    from finetune import Config

# Initialisations that are not files, and their names in tables.
NAMES = {"random": "Scratch", "imagenet": "ImageNet"}
# Settings that come from a flag, else from the first checkpoint that has any, else from here.
INHERITED = {"data": "data/nih", "arch": "resnet50", "image_size": 224, "normalize": "fixed",
             "clahe": False}


# --------------------------------------------------------------------------------------------------
# Vocabulary: a study has combinations of mode, fraction, initialisation and seed, and each
# combination has an outcome.

class Combination(NamedTuple):
    """One training, and the key of its predictions in predictions.pt."""
    mode: str                           # linear or full
    fraction: float                     # of the labelled patients
    init: str                           # an Init's key
    seed: int

    @property
    def starts_from_probe(self) -> bool:
        """Whether training starts from the linear probe, because a random head would distort a
        pre-trained encoder in the first steps (Kumar et al. 2022)."""
        return self.mode == "full" and self.init != "random"


class Init(NamedTuple):
    """An initialisation of the encoder."""
    source: str                         # random, imagenet or the path of a checkpoint
    # Stands for it in predictions.pt: random, imagenet, or a digest of the file's content, because
    # a file can be overwritten or moved.
    key: str
    name: str                           # in tables
    settings: dict[str, Any]            # those of INHERITED that the checkpoint has
    labels_required: int | str          # number of labelled images that trained it, or "unknown"


class Outcome(NamedTuple):
    """The result of a combination; None for what its mode does not have."""
    net: Classifier
    val: np.ndarray                     # (n_val, L) probabilities
    test: np.ndarray                    # (n_test, L)
    strength: float | None = None       # linear: the strength of regularisation that val chose
    epoch: int | None = None            # full: the best on val; 0 is the linear probe
    history: list[dict[str, Any]] | None = None     # full: its lines of log.jsonl
    peaks: Tensor | None = None         # full, --peak: (epochs, n_test, L) test after each epoch


@dataclass(frozen=True)
class Study:
    """What all combinations of a run have in common."""
    config: "Config"
    compute: Compute
    manifest: Manifest
    settings: dict[str, Any]            # the flags that say what is computed, and those inherited
    inits: dict[str, Init]              # by key
    label_names: list[str]              # L
    task: Task
    policy: str                         # how labels were read, in words
    splits: dict[str, np.ndarray]       # the images of each split that have labels
    # Draws from the train split, by fraction and seed. With --folds there is no test split and no
    # draw here: each fold has splits and draws of its own.
    draws: dict[tuple[float, int], Draw]
    # The content of predictions.pt, by Combination. It grows as combinations are finished.
    predictions: dict[Any, dict[str, Any]] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def last(self) -> Path:
        return self.out / "last.pt"

    # last.pt holds the full combination in training, as it was after its last whole epoch. A
    # command that asks for other combinations renames a last.pt that an earlier command began to
    # last-FRACTION-INIT-SEED.pt. A command that asks for it again renames it back. Once the
    # predictions of a combination are in predictions.pt, last.pt is free for the next one.
    def waiting_file(self, key: tuple) -> Path:
        """The file in which a combination's last.pt waits while others are trained."""
        return self.out / f"last-{plain_name('-'.join(map(str, key[1:])))}.pt"

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.settings["image_size"], self.settings["normalize"],
                             self.settings["clahe"])

    def classifier(self, init: Init, say: Callable = lambda text: None) -> Classifier:
        """The network that training starts from, with a new linear layer. CheckpointError if the
        encoder does not fit. say: reports which weights were taken from another tool's file."""
        encoder = build_encoder(self.settings["arch"], init.source, say)
        projector = first_layers(init.source, self.config.from_head or 0, encoder)
        return Classifier(encoder, self.task.outputs, projector)

    def name(self, c: Combination) -> str:
        return f"{self.inits[c.init].name}, {c.mode}, {100 * c.fraction:g} %, seed {c.seed}"

    def folder_name(self, c: Combination) -> str:
        """The name in letters that a folder may have. If two initialisations get the same name,
        their keys are added."""
        names = [plain_name(self.name(c._replace(init=key))) for key in self.inits]
        own = plain_name(self.name(c))
        return own if names.count(own) == 1 else f"{own}-{plain_name(c.init)}"

    def sample(self, c: Combination) -> np.ndarray:
        """The images (m,) that a combination learns from."""
        return self.splits["train"][self.draws[c.fraction, c.seed].rows]

    @property
    def images(self) -> np.ndarray:
        """The images (n,) of all splits, one after the other."""
        return np.concatenate(list(self.splits.values()))

    def by_name(self, combinations: list[Combination]) -> dict[tuple, dict[str, Any]]:
        """The predictions of these, by (mode, fraction, name of the initialisation, seed)."""
        return {(c.mode, c.fraction, self.inits[c.init].name, c.seed): self.predictions[c]
                for c in combinations}

    def truth(self, split: str) -> np.ndarray:
        return self.task.truth[self.splits[split]]                          # (n, L)

    def val_score(self, probabilities: np.ndarray) -> float:
        """The score by which everything is chosen, from probabilities (n_val, L)."""
        return val_score(probabilities, self.truth("val"))

    @functools.cached_property
    def measure(self) -> str:
        """The name of `val_score`'s measure here: perfect predictions score AUROC 1, or Brier 0."""
        perfect = self.val_score(self.truth("val"))
        return "AUROC" if perfect > 0 else "minus the Brier score"


def key_in(file: Path) -> tuple | None:
    """The combination whose training a last.pt holds; None if the file is missing or damaged."""
    with contextlib.suppress(CheckpointError):
        key = load_checkpoint(file).get("key")
        return key if isinstance(key, tuple) else None
    return None


def read_inits(config: "Config", say: Callable) -> list[Init]:
    """The initialisations of --init, each once. DataError if there is none, CheckpointError if a
    file cannot be read."""
    sources = config.init or (default_encoder(),)
    # Two paths to one file, or to copies of it, are the same initialisation.
    source_of: dict[str, str] = {}      # by key
    for source in sources:
        key = source
        if source not in NAMES:
            key = f"checkpoint {run_folder.content_of_file(source)}"
        if source_of.setdefault(key, source) != source:
            say(f"{source} is the same as {source_of[key]}, and left out")

    inits = []
    files = [source for source in source_of.values() if source not in NAMES]
    for key, source in source_of.items():
        state = load_checkpoint(source) if source in files else {}
        name = NAMES.get(source, source)
        if state.get("format") == FORMAT and "classifier" not in state:
            name = "SimCLR" if len(files) == 1 else f"SimCLR ({source})"
        if config.from_head:
            name += f", head layer {config.from_head}"
        # Each row of the table needs a name of its own, even if a file is called ImageNet.
        if name in [init.name for init in inits]:
            name += f" ({key})"
        inits.append(Init(source, key, name, settings_of(state), labels_required(source, state)))
    return inits


def inherit(config: "Config", inits: list[Init], say: Callable) -> dict[str, Any]:
    """Data, architecture and preprocessing: from the flags, else from the first checkpoint that
    has any of them.

    They are the same for all initialisations, so that these can be compared."""
    flags = {name: getattr(config, name) for name in INHERITED
             if getattr(config, name) is not None}
    # Another tool's file may have none of them; random and imagenet never have any.
    first = next((init for init in inits if init.settings), None)
    inherited = INHERITED | (first.settings if first else {}) | flags
    if first:
        say(f"inherited from {first.source}:", ", ".join(
            f"{name} {value}" for name, value in first.settings.items() if name not in flags))
    for init in inits:
        differences = [f"{name} {value}" for name, value in init.settings.items()
                       if value != inherited[name] and name != "data"]
        if differences:
            say(f"{init.source} was trained with {', '.join(differences)}, which is not what it "
                "is given here")
    return inherited


def labelled_images(manifest: Manifest, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The images of these splits that have a label; DataError if a split has none.

    An image whose cells are all empty has no labels, whatever --blank says."""
    table = manifest.folder / "manifest.csv"
    if not manifest.label_names:
        raise DataError(f"{table} has no label column: there is nothing to fine-tune on")
    label_count = (~np.isnan(manifest.labels)).sum(1)                       # (N,)
    splits = {}
    for split in names:
        images = manifest.images(split)
        splits[split] = images[label_count[images] > 0]
    for split, images in splits.items():
        if not len(images):
            raise DataError(f"{table}: no image of the {split} split has a label")
    return splits


def task_of(label_names: list[str], manifest: Manifest, train: np.ndarray,
            config: "Config") -> Task:
    """The task that these labels make, read by the policies of the flags."""
    columns = [manifest.label_names.index(name) for name in label_names]
    return make_task(manifest.labels[:, columns], train, config.uncertain, config.blank)


def teachable_labels(manifest: Manifest, train: np.ndarray, config: "Config",
                     say: Callable) -> list[str]:
    """The labels, all or those of --labels, that have a positive and a negative in train (with
    --folds: in train and val). DataError if there is none."""
    table, where = manifest.folder / "manifest.csv", "train and val" if config.folds else "train"
    candidates = list(config.labels) or manifest.label_names
    if unknown := set(candidates) - set(manifest.label_names):
        raise DataError(f"--labels {unknown.pop()}: {table} has {', '.join(manifest.label_names)}")
    columns = task_of(candidates, manifest, train, config).training_labels[train].T  # (L, n)
    names = [name for name, column in zip(candidates, columns) if {0, 1} <= set(column.tolist())]
    if not names:
        raise DataError(f"{table}: no label has a positive and a negative in {where}, with "
                        f"--uncertain {config.uncertain} and --blank {config.blank}")
    if left_out := [name for name in candidates if name not in names]:
        say(f"left out, without both a positive and a negative in {where}:", ", ".join(left_out))
    return names


def frequent_labels(names: list[str], manifest: Manifest, images: np.ndarray, config: "Config",
                    say: Callable) -> list[str]:
    """The labels that a cross-validation over these images can score; DataError if there is
    none."""
    truth = task_of(names, manifest, images, config).truth[images]          # (n, L)
    if not ((truth == 1).any(0) & (truth == 0).any(0)).any():
        raise DataError(f"{manifest.folder / 'manifest.csv'}: --folds can score no label, as none "
                        "has a certain positive and a certain negative in train and val")
    counted = counted_labels(truth)
    if rare := [name for name, enough in zip(names, counted) if not enough]:
        say(f"left out, with fewer than {PROBE_CELLS} positives or negatives:", ", ".join(rare))
    return [name for name in names if name not in rare]


def check_truth(task: Task, label_names: list[str], manifest: Manifest,
                splits: dict[str, np.ndarray], say: Callable) -> None:
    """DataError if val or test can score nothing; say which labels val cannot score."""
    for split in ("val", "test"):
        if np.isnan(task.truth[splits[split]]).all():
            raise DataError(f"{manifest.folder / 'manifest.csv'}: the {split} split has only "
                            f"uncertain or empty cells in {', '.join(label_names)}")
    for name, column in zip(label_names, task.truth[splits["val"]].T):
        if not {0, 1} <= set(column.tolist()):
            say(f"{name} has one class only in val: its threshold is 0.5, and it has no say in "
                "what is chosen there")


def read_study(config: "Config", compute: Compute) -> Study:
    """Read what is compared, on which images, and draw the patients. Errors in the input are found
    here, before anything is written."""
    say = compute.say
    inits = read_inits(config, say)
    inherited = inherit(config, inits, say)

    # The labels that train can teach. These may be exclusive even if all labels together are not.
    manifest = read_manifest(inherited["data"])
    splits = labelled_images(manifest, ("train", "val") if config.folds else SPLITS)
    train = splits["train"]
    if config.folds:                    # then val is trained on as well
        train = np.concatenate([train, splits["val"]])
    names = teachable_labels(manifest, train, config, say)
    if config.folds:
        names = frequent_labels(names, manifest, train, config, say)
    task = task_of(names, manifest, train, config)
    if not config.folds:
        check_truth(task, names, manifest, splits, say)
    counts = ", ".join(f"{len(images)} {split}" for split, images in splits.items())
    policy = policy_sentence(task.kind, config.uncertain, config.blank, config.balance)
    say(f"{manifest.folder}: {counts} images with labels\n"
        f"{len(names)} labels ({', '.join(names)}): {policy}; -1 is never scored")

    # The patients that each combination learns from.
    labels = task.training_labels[train]                                    # (n, L)
    draws = {}
    if not config.folds:                # each fold has draws of its own
        draws = {(fraction, seed): draw(manifest.patients[train], labels, fraction, seed)
                 for fraction, seed in itertools.product(config.fraction, config.seeds)}
    if config.batch_size % compute.world_size:
        raise DataError(f"--batch-size {config.batch_size} is global and must divide by the "
                        f"{compute.world_size} processes")
    settings = run_folder.fixed_flags(config) | inherited
    study = Study(config, compute, manifest, settings, {init.key: init for init in inits}, names,
                  task, policy, splits, draws)
    # Each combination will build its own network. Try it now, so that an encoder that does not fit
    # is refused before another one has been trained for hours.
    for init in inits:
        study.classifier(init, say)
    return study
