"""Everything that made a clip, in its own file and in a YAML beside it, so that it can be made again.

    clip.save("cat.mp4")          # cat.mp4 holds the recipe as metadata; cat.yaml, and cat.png of an image, lie beside it
    again = repeat("cat.yaml")    # or repeat("cat.mp4")

The mp4 alone tells what it is wherever it is copied to; the YAML is for reading and editing. A picture is saved as a PNG in
the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmeff.errors import MediaError, suggest
from mmeff.report import environment
from mmeff.video_io import CONTAINERS, replacing, write

if TYPE_CHECKING:
    from PIL.Image import Image

KIND = "generate"
PICTURE = ".png"  # the suffix of a clip of one frame that is saved as what it is


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What made one clip.

    Fields: `model` a name or a folder, empty for a pipeline that was built in memory; `dtype` of its weights; `offload`;
    `methods` the resolved configs, empty for a dense run; `prompt`; `negative_prompt` None for the pipeline's own; `seed` of
    the noise, which is drawn on the CPU; `settings` of the pipeline call, its defaults written out; `image` the file of the
    first frame, beside the recipe; `fps` of the mp4; `note` what must be known about the model (a tiny or random one);
    `environment` versions and hardware.
    """

    model: str
    prompt: str
    seed: int
    fps: float
    dtype: str = "auto"
    offload: str = "none"
    methods: tuple[dict[str, Any], ...] = ()
    negative_prompt: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    note: str = ""
    environment: dict[str, str] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML types."""
        return {"mmeff": KIND, **asdict(self), "methods": [dict(method) for method in self.methods]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """Read a mapping.

        Raises:
            ValueError: not a recipe, or a field is missing. TypeError: a field that recipes do not have.
        """
        values = dict(values)
        if values.pop("mmeff", None) != KIND:
            raise ValueError(f"{where} is no recipe of a clip: it must say `mmeff: {KIND}`, got keys {sorted(values)}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(f"{where} has no field {name!r}.{suggest(name, known)} Fields: {', '.join(known)}.")
        missing = [name for name in ("model", "prompt", "seed", "fps") if name not in values]
        if missing:
            raise ValueError(
                f"{where} must have the fields model, prompt, seed and fps, got none of {', '.join(missing)}"
            )
        return cls(**{**values, "methods": tuple(values.get("methods") or ())})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe of a clip, from its YAML or from the metadata of the video or picture itself.

        Raises:
            FileNotFoundError: no such file. MediaError: a video that holds no recipe. ValueError, TypeError: as `from_dict`.
        """
        path = Path(path)
        if path.suffix.lower() in (*CONTAINERS, PICTURE):
            return cls.from_dict(_embedded(path), f"the metadata of {path}")
        from mmeff.registry import read_yaml

        return cls.from_dict(read_yaml(path), str(path))


def check_out(path: str | os.PathLike[str]) -> Path:
    """The path of a video or a picture that can be written, checked before anything is generated.

    Raises:
        ValueError: another suffix than .mp4, .mov, .mkv or .png. IsADirectoryError, PermissionError: a folder that is missing or
            cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in (*CONTAINERS, PICTURE):
        raise ValueError(
            f"cannot write {path}: a video's name must end in {', '.join(CONTAINERS)}, a picture's in {PICTURE}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: {path.parent} is missing or not writable; choose another path")
    return path


def save(path: Path, frames: Any, recipe: dict[str, Any], image: Image | None) -> None:
    """Write the video or the picture with its recipe inside, the YAML, and the image that it started from."""
    import yaml

    still = path.suffix.lower() == PICTURE
    if image is not None:
        picture = path.with_name(f"{path.stem}-input.png") if still else path.with_suffix(".png")
        with replacing(picture) as partial:
            image.save(partial)
        recipe = {**recipe, "image": picture.name}
    metadata = {"title": recipe["prompt"], "comment": json.dumps(recipe, ensure_ascii=False)}
    if still:
        _write_picture(path, frames, metadata)
    else:
        with replacing(path) as partial, TemporaryDirectory() as folder:
            _embed(write(Path(folder) / "plain.mp4", frames, fps=recipe["fps"]), partial, metadata)
    with replacing(path.with_suffix(".yaml")) as partial:
        partial.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120), "utf-8")


def _write_picture(path: Path, frames: Any, metadata: Mapping[str, str]) -> None:
    """Write the one frame of a clip as a PNG with text chunks. Raises: ValueError: there are more frames."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if len(frames) != 1:
        raise ValueError(
            f"cannot write {path}: a clip of {len(frames)} frames is a video, whose name must end in {', '.join(CONTAINERS)}"
        )
    chunks = PngInfo()
    for name, text in metadata.items():
        chunks.add_itxt(name, text)
    with replacing(path) as partial:
        Image.fromarray(frames[0]).save(partial, pnginfo=chunks)


def _embed(plain: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Copy the packets of an mp4 as they are, into a container with metadata.

    From an mp4, because that tells when each packet is decoded; Matroska tells only when it is shown.
    """
    import av

    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        target.metadata.update(metadata)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:  # the last one is empty and only ends the stream
                packet.stream = stream
                target.mux(packet)


def _embedded(path: Path) -> Mapping[str, Any]:
    """The recipe in the metadata of a video or a picture."""
    import av
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    try:
        if path.suffix.lower() == PICTURE:
            with Image.open(path) as picture:
                tags = {name: str(text) for name, text in picture.info.items()}
        else:
            with av.open(str(path)) as container:
                tags = {name.lower(): text for name, text in container.metadata.items()}  # mkv spells them in capitals
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path} cannot be read: {error}") from error
    try:
        values = json.loads(tags.get("comment", ""))
    except ValueError:
        values = None
    if not isinstance(values, Mapping):
        raise MediaError(f"{path} holds no recipe; only videos and pictures that VideoGenerator saved do")
    return values


__all__ = ["Recipe", "check_out", "save"]
