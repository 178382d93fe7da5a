"""From a composed config to the parts of a run: the only module that knows both."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

# Importing a module registers its parts.
import prune_tell.data.coco
import prune_tell.data.flickr
import prune_tell.data.shapes
import prune_tell.data.table
import prune_tell.pruning.topk  # noqa: F401
from prune_tell.config import arguments, convert, plain
from prune_tell.data.features import FeatureCache, Features, cache_key, fill_cache
from prune_tell.data.loader import CaptionItems, limit_records
from prune_tell.data.records import Dataset, OnError, Problems, Record, Split, datasets
from prune_tell.data.tokenizer import Tokenizer
from prune_tell.data.transforms import Preprocessing, build_transform
from prune_tell.errors import UserError
from prune_tell.evaluation.captioning import Generation
from prune_tell.models.backbone import Backbone, build_backbone, check_backbone
from prune_tell.models.captioner import Captioner, Projection
from prune_tell.models.decoder import Decoder
from prune_tell.models.positions import GridPositions
from prune_tell.pruning.reduction import reducers
from prune_tell.pruning.token_dropout import TokenDropout
from prune_tell.training.checkpoint import find_checkpoint, load_checkpoint
from prune_tell.training.loop import autocast_for


@dataclass(frozen=True)
class DataSettings:
    """What every data set has in common, whatever its format; the rest of the `data` node goes to its builder.

    Attributes:
        name: for folders and reports.
        on_error: what to do with a broken item: `skip` (and report it) or `refuse`.
        verify: how closely photographs are looked at before training: `none`, `quick` (headers and ends) or
            `full` (decoded).
        max_images: use only the first so many training images.
        max_captions: use only the first so many captions of a training image.
        captions_per_image: how many of an image's captions a training step draws; None for all.
        tokenizer: `word` or `bpe`.
        vocab_size: most entries of the vocabulary, the four special ones included.
        min_count: how often a word must occur to get an entry.
        max_length: longest caption in tokens, BOS and EOS included; longer ones are cut.
        num_workers: loader processes.
        cache_features: keep a frozen backbone's features on disk.
        cache_dir: where.
        cached_views: with `cache_features`, so many versions of each training image: as it is, and augmented ones.
        augment: crop and recolour training images at random.
        mirror: augmentation also mirrors them (captions that say "left" are then wrong half of the time).
    """

    name: str = "data"
    on_error: OnError = "skip"
    verify: Literal["none", "quick", "full"] = "quick"
    max_images: int | None = None
    max_captions: int | None = None
    captions_per_image: int | None = 5
    tokenizer: Literal["word", "bpe"] = "word"
    vocab_size: int | None = None
    min_count: int = 1
    max_length: int = 40
    num_workers: int = 0
    cache_features: bool = False
    cache_dir: Path = Path("cache")
    cached_views: int = 1
    augment: bool = False
    mirror: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("max_images", 1),
            ("max_captions", 1),
            ("captions_per_image", 1),
            ("min_count", 1),
            ("cached_views", 1),
            ("max_length", 3),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"data.{name}={value} is out of range: {low} or more")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers} is out of range: 0 or more")


def data_settings(cfg: DictConfig) -> DataSettings:
    """Check the common part of the `data` node."""
    names = DataSettings.__dataclass_fields__
    return DataSettings(**arguments(DataSettings, {k: v for k, v in plain(cfg.data).items() if k in names}, key="data"))


def build_dataset(cfg: DictConfig) -> tuple[Dataset, Problems]:
    """Build the data set that `data.format` names; reading it already reports its problems."""
    settings, node = data_settings(cfg), plain(cfg.data)
    builder = datasets[node.pop("format")]
    problems = Problems(settings.on_error)
    wanted = inspect.signature(builder).parameters
    options = {k: v for k, v in node.items() if k not in DataSettings.__dataclass_fields__ or k in wanted}
    return builder(problems=problems, **arguments(builder, options, key="data", given=("problems",))), problems


def training_records(dataset: Dataset, settings: DataSettings) -> list[Record]:
    """The training split, limited as the config asks."""
    records = limit_records(
        dataset.records("train"), max_images=settings.max_images, max_captions=settings.max_captions
    )
    if not records:
        raise UserError("data: the training split has no images (see data_problems.json)")
    return records


def train_tokenizer(records: Sequence[Record], settings: DataSettings) -> Tokenizer:
    """Learn the vocabulary from the training captions alone."""
    captions = (caption for record in records for caption in record.captions)
    return Tokenizer.train(
        captions, kind=settings.tokenizer, vocab_size=settings.vocab_size, min_count=settings.min_count
    )


@dataclass(frozen=True)
class ModelOptions:
    """The model part of a config, checked: keyword arguments for each builder."""

    backbone: dict[str, Any]
    method: Callable[..., nn.Module]
    pruning: dict[str, Any]
    decoder: dict[str, Any]
    grid_positions: dict[str, Any]
    token_dropout: float


def model_options(cfg: DictConfig) -> ModelOptions:
    """Check everything about the model that can be checked without data or weights, so that a mistake ends at once.

    Raises:
        UserError: for the first impossible value.
    """
    node, extra = plain(cfg.backbone), ("label", "lr", *PREPROCESSING_KEYS)
    backbone = arguments(build_backbone, {k: v for k, v in node.items() if k not in extra}, key="backbone")
    check_backbone(backbone["name"], backbone.get("weights"))
    prune = plain(cfg.pruning)
    method = reducers[prune.pop("method")]
    pruning = arguments(method, prune, key="pruning", given=("width",))
    decoder_node = plain(cfg.decoder)
    grid_kind, hidden = decoder_node.pop("grid_positions"), decoder_node.pop("token_dropout", 0.0)
    decoder = arguments(Decoder, decoder_node, key="decoder", given=("vocab_size", "max_length"))
    grid = arguments(GridPositions, {"kind": grid_kind}, key="decoder.grid_positions", given=("d_model",))
    check_decoder(decoder)
    token_dropout = convert(float, hidden, "decoder.token_dropout")
    with torch.device("meta"):  # built without memory or random numbers, for the checks in the parts themselves
        method(width=8, **pruning)
        GridPositions(d_model=Decoder(vocab_size=8, max_length=8, **decoder).d_model, **grid)
        TokenDropout(token_dropout)
    return ModelOptions(backbone, method, pruning, decoder, grid, token_dropout)


def build_captioner(cfg: DictConfig, *, vocab_size: int, max_length: int, fetch: bool = True) -> Captioner:
    """Build backbone, reducer, projection and decoder from their config nodes.

    Args:
        cfg: a composed `train` config.
        vocab_size: from the tokenizer.
        max_length: most positions of a caption.
        fetch: False leaves out downloads and weight files, for models whose weights come from a checkpoint.
    """
    options = model_options(cfg if fetch else OmegaConf.merge(cfg, {"backbone": NO_WEIGHTS}))  # type: ignore[arg-type]
    decoder = Decoder(vocab_size=vocab_size, max_length=max_length, **options.decoder)
    cls_attention = options.pruning.get("score") == "cls_attention"
    backbone = build_backbone(cls_attention=cls_attention, **options.backbone)
    return Captioner(
        backbone=backbone,
        reducer=options.method(width=backbone.width, **options.pruning),
        projection=Projection(
            width=backbone.width, d_model=decoder.d_model, dropout=options.decoder.get("dropout", 0.0)
        ),
        grid_positions=GridPositions(d_model=decoder.d_model, **options.grid_positions),
        decoder=decoder,
        token_dropout=options.token_dropout,
    )


def check_decoder(options: dict[str, Any]) -> None:
    """Refuse impossible sizes and rates (what heads and positions need of d_model is checked by them)."""
    for name in ("d_model", "layers", "heads", "ff_dim"):
        if options.get(name, 1) < 1:
            raise UserError(f"decoder.{name}={options[name]} is out of range: 1 or more")
    for name in ("dropout", "attention_dropout"):
        if not 0.0 <= (options.get(name) or 0.0) < 1.0:
            raise UserError(f"decoder.{name}={options[name]} is out of range: 0 up to, not including, 1")


PREPROCESSING_KEYS = ("mean", "std", "interpolation", "fit", "crop_ratio")
NO_WEIGHTS = {"pretrained": False, "weights": None}


def preprocessing_for(backbone: Backbone, node: dict[str, Any]) -> Preprocessing:
    """The recipe that belongs to the weights, with what the config overrides."""
    from timm.data import resolve_model_data_config

    own = resolve_model_data_config(backbone.model)
    rows, columns = backbone.image_size
    recipe = Preprocessing(
        image_size=(rows, columns),
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        interpolation=own["interpolation"],
        fit="squash" if own.get("crop_mode") == "squash" else "crop",
        crop_ratio=own["crop_pct"],
    )
    hints = get_type_hints(Preprocessing)
    given = {k: convert(hints[k], node[k], f"backbone.{k}") for k in PREPROCESSING_KEYS if node.get(k) is not None}
    return replace(recipe, **given)


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Raises:
        UserError: if the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is unknown (auto, cpu, cuda or cuda:N)") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def cached_features(
    captioner: Captioner,
    recipe: Preprocessing,
    records: Sequence[Record],
    dataset: Dataset,
    cfg: DictConfig,
    *,
    device: torch.device,
    what: str,
    view: int = 0,
) -> FeatureCache | None:
    """Compute (or find) the features of a split on disk; None if the config doesn't ask for it.

    Args:
        captioner, recipe, records, dataset, cfg, device: what decides the features.
        what: the split's name, for the folder and the progress bar.
        view: 0 for the images as they are; any other number for that augmented version of them.

    Raises:
        UserError: if the backbone trains, or images are augmented: the features would not stay the same.
    """
    settings = data_settings(cfg)
    if not settings.cache_features:
        return None
    if not captioner.backbone.frozen:
        raise UserError(f"data.cache_features=true needs backbone.trainable=frozen, not {cfg.backbone.trainable}")
    if settings.augment:
        raise UserError(
            "data.cache_features=true and data.augment=true exclude each other, because cached images don't change: "
            "data.cached_views=4 keeps four versions of each"
        )
    transform = build_transform(recipe, augment=view > 0, mirror=settings.mirror)
    sources = {k: v for k, v in plain(cfg.data).items() if k not in DataSettings.__dataclass_fields__}
    precision = cfg.trainer.precision
    what_else = {"preprocessing": recipe.to_dict(), "data": sources, "precision": precision}
    what_else |= {"backbone": plain(cfg.backbone), "view": [view, settings.mirror] if view else None}
    what += f" view {view}" if view else ""
    key = cache_key(captioner.backbone, what_else, records)
    folder = settings.cache_dir / f"{cfg.backbone.name}-{what.replace(' ', '-')}-{key}"

    def encode(rows: Sequence[int]) -> tuple[list[int], Features | None]:
        readable: list[int] = []
        images: list[Tensor] = []
        for row in rows:
            try:
                image = dataset.open(records[row])
                with torch.random.fork_rng(devices=[]):  # a view is the same however often it is taken up again
                    torch.manual_seed(view * 1_000_003 + row)
                    images.append(transform(image))
                readable.append(row)
            except OSError as error:
                tqdm.write(f"unreadable image: {error}")
        if not images:
            return [], None
        with torch.inference_mode(), autocast_for(device, precision)():
            return readable, captioner.encode(torch.stack(images).to(device))

    captioner.backbone.eval()
    return fill_cache(
        folder,
        records,
        encode,
        batch_size=32,
        progress=lambda batches: iter(tqdm(batches, desc=f"features ({what})", unit="batch", disable=not batches)),
    )


def make_items(
    records: Sequence[Record],
    dataset: Dataset,
    tokenizer: Tokenizer,
    recipe: Preprocessing,
    settings: DataSettings,
    *,
    seed: int,
    training: bool,
    cache: FeatureCache | None,
    views: Sequence[FeatureCache] = (),
) -> CaptionItems:
    """Items of a split: drawn captions and augmentation in training, everything as it is otherwise."""
    return CaptionItems(
        records,
        open_image=dataset.open,
        transform=build_transform(recipe, augment=training and settings.augment, mirror=settings.mirror),
        encode=lambda caption: tokenizer.encode(caption, settings.max_length),
        captions_per_image=settings.captions_per_image if training else None,
        seed=seed,
        cache=cache,
        views=views,
    )


def merged_generation(run: "LoadedRun", changes: dict[str, Any]) -> Generation:
    """How the run writes captions, with those changes that aren't null."""
    changed = {key: value for key, value in changes.items() if value is not None}
    return Generation(**arguments(Generation, plain(run.cfg.generation) | changed, key="generation"))


@dataclass
class LoadedRun:
    """A trained captioner and everything it needs to caption."""

    cfg: DictConfig
    captioner: Captioner
    tokenizer: Tokenizer
    recipe: Preprocessing
    meta: dict[str, Any]


def load_run(run: Path, *, device: torch.device, which: str | None = None) -> LoadedRun:
    """Load a run for inference: no network, no code from the file.

    Args:
        run: a run's folder or a checkpoint in it.
        which: `best` or `last`; best where None.
    """
    folder = find_checkpoint(run, which)
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    recipe = Preprocessing.from_dict(json.loads((folder / "preprocessing.json").read_text()))
    captioner = build_captioner(cfg, vocab_size=len(tokenizer), max_length=data_settings(cfg).max_length, fetch=False)
    load_checkpoint(folder, captioner)
    meta = json.loads((folder / "meta.json").read_text())
    return LoadedRun(cfg, captioner.to(device).eval(), tokenizer, recipe, meta)


def split_records(dataset: Dataset, split: Split) -> Sequence[Record]:
    """A split that must not be empty.

    Raises:
        UserError: naming the splits that have images.
    """
    records = dataset.records(split)
    if not records:
        full = [name for name in ("train", "val", "test") if dataset.records(name)]  # type: ignore[arg-type]
        raise UserError(f"split={split} has no images in this data set (with images: {', '.join(full) or 'none'})")
    return records


def settings_json(settings: Any) -> str:
    """A settings dataclass as one line of JSON."""
    return json.dumps(asdict(settings), default=str)
