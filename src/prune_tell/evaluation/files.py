"""Reads predictions and references from the JSON files that captioning code leaves."""

import json
from pathlib import Path
from typing import Any

from prune_tell.errors import UserError

PREDICTION_FORMATS = 'COCO results `[{"image_id": 1, "caption": "..."}]` or `{"1": "..."}`'
REFERENCE_FORMATS = 'COCO annotations `{"annotations": [{"image_id": 1, "caption": "..."}]}` or `{"1": ["...", "..."]}`'


def read_predictions(path: str | Path) -> dict[int | str, str]:
    """Read one caption per image.

    Args:
        path: a JSON file, either COCO results (`[{image_id, caption}]`) or `{id: caption}`.

    Returns:
        Image id -> caption, in the order of the file; ids as they are there (JSON keys are text).

    Raises:
        UserError: if the file can't be read, is neither format, or has an image twice.
    """
    content = _load(path, "predictions")
    if isinstance(content, list):
        pairs = [_image_and_caption(item, path, "predictions", PREDICTION_FORMATS) for item in content]
    elif isinstance(content, dict) and all(isinstance(caption, str) for caption in content.values()):
        pairs = list(content.items())
    else:
        raise UserError(f"predictions={path} is neither {PREDICTION_FORMATS}")
    predictions: dict[int | str, str] = {}
    for image_id, caption in pairs:
        if image_id in predictions:
            raise UserError(f"predictions={path} has image {image_id} twice (one caption per image)")
        predictions[image_id] = caption
    return predictions


def read_references(path: str | Path) -> dict[int | str, list[str]]:
    """Read the human captions of each image.

    Args:
        path: a JSON file, either COCO annotations (`{"images", "annotations": [{image_id, caption}]}`)
            or `{id: [captions]}`.

    Returns:
        Image id -> captions, in the order of the file; ids as they are there.

    Raises:
        UserError: if the file can't be read, is neither format, or holds no caption.
    """
    content = _load(path, "references")
    references: dict[int | str, list[str]] = {}
    if isinstance(content, dict) and isinstance(annotations := content.get("annotations"), list):
        for item in annotations:
            image_id, caption = _image_and_caption(item, path, "references", REFERENCE_FORMATS)
            references.setdefault(image_id, []).append(caption)
    elif isinstance(content, dict) and all(_is_caption_list(captions) for captions in content.values()):
        references.update(content)
    else:
        raise UserError(f"references={path} is neither {REFERENCE_FORMATS}")
    if not references:
        raise UserError(f"references={path} holds no caption")
    return references


def _load(path: str | Path, key: str) -> Any:
    """Parse a JSON file; an object that has a name twice is refused, where Python would keep the last one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in content if names.count(name) > 1)
            raise UserError(f"{key}={path} has '{twice}' twice in one object")
        return content

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{key}={path} can't be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path} is not JSON ({error})") from error


def _image_and_caption(item: Any, path: str | Path, key: str, formats: str) -> tuple[int | str, str]:
    """Return the two fields of one COCO entry."""
    match item:
        case {"image_id": int() | str() as image_id, "caption": str() as caption}:
            return image_id, caption
    entry = str(item)[:100]
    raise UserError(f"{key}={path} has the entry {entry} without image_id and caption (allowed: {formats})")


def _is_caption_list(captions: Any) -> bool:
    return isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
