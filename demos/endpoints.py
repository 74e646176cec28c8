"""The same actions for programs: typed endpoints that Gradio documents, and its clients call by name.

from gradio_client import Client
client = Client("http://127.0.0.1:7860")
client.predict("a red square moving left", methods=["radial"], api_name="/generate")
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from mmeff.registry import ROOMS

from .app import Page
from .fields import config_from, methods_of, open_fields
from .tab_generate import STAGE
from .uploads import Uploads
from .wishes import Wish

STAGES = tuple(room.rsplit(".", 1)[1] for room in ROOMS)


def build(service: Any, page: Page) -> None:
    """Register the endpoints of generation, and those that all tabs share, inside the block that is open."""
    uploads = Uploads(page.settings)

    def wish(
        prompt: str, model: str, methods: list[Any], seed: int, sizes: dict[str, Any] | None, image: Any = None
    ) -> Wish:
        if not isinstance(methods, list | tuple):
            raise TypeError(f"methods must be a list of names or mappings, got {type(methods).__name__}")
        return Wish(
            model=model, prompt=prompt, methods=tuple(config_from(method, STAGE) for method in methods), seed=seed,
            sizes=checked_sizes(sizes), image=uploads.image(image),
        )  # fmt: skip

    def models() -> list[dict[str, Any]]:
        """List the models that this demo offers.

        Returns:
            one mapping per model: name, kind (video, image or vlm), embedded, loaded.
        """
        offers = service.models.offers.values()
        return [
            {"name": one.name, "kind": one.kind, "embedded": one.embedded, "loaded": service.models.loaded(one.name)}
            for one in offers
        ]

    def methods(stage: str = STAGE) -> list[dict[str, Any]]:
        """List the methods of a stage with every field that may be set.

        Args:
            stage: "diffusion_attn" for videos and pictures, "pruning" for questions, "vision_backbones" for backbones.
        """
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {str(stage)[:40]!r}")
        return [
            {
                "method": name, "summary": cls.summary(), "source": cls.source,
                "fields": [
                    {"name": f.name, "type": f.type, "default": f.default, "unit": f.unit, "doc": f.doc} for f in open_fields(cls)
                ],
            }
            for name, cls in methods_of(stage).items()
        ]  # fmt: skip

    def plan(
        model: str = "tiny-video", methods: list[Any] = ["radial"], sizes: dict[str, Any] | None = None  # noqa: B006
    ) -> dict[str, Any]:  # fmt: skip
        """Say what each method would do, before anything runs: density, predicted speedup, reasons for fallbacks.

        Args:
            model: a name from /models.
            methods: names, or mappings such as {"method": "radial", "decay": 0.2}.
            sizes: height, width, num_frames, num_inference_steps; those left out are the model's own.
        """
        found = service.generating.plan(wish("any", model, methods, 0, sizes))
        return {name: one.to_dict() for name, one in found.items()}

    def generate(
        request: gr.Request, prompt: str, model: str = "tiny-video", methods: list[Any] = ["radial"],  # noqa: B006
        seed: int = 0, sizes: dict[str, Any] | None = None, image: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Generate a video or a picture dense and with each method, from the same noise, and compare them.

        Args:
            prompt: what it should show.
            model: a name from /models, of kind video or image.
            methods: names, or mappings such as {"method": "radial", "decay": 0.2}.
            seed: of the noise.
            sizes: height, width, num_frames, num_inference_steps, guidance_scale; those left out are the model's own.
            image: the first frame, for models that take one; pass gradio_client.handle_file(path).
        Returns:
            what ran: variants with time, speedup, PSNR, SSIM, density and files, the plans, and the machine.
        """
        asked = wish(prompt, model, methods, seed, sizes, image)
        *_, result = service.generating.run(asked, page.user(request))
        found = result.to_dict()
        for variant in found["variants"]:
            variant["files"] = {what: _file(result.run, address) for what, address in variant["files"].items()}
        return found

    def cancel(request: gr.Request) -> int:
        """Stop every run of this client before its next step.

        Returns:
            how many runs there were.
        """
        return int(service.cancel(page.user(request)))

    for action in (models, methods):
        gr.api(page.run(action), api_name=action.__name__, queue=False)
    gr.api(page.run(plan), api_name="plan", **page.quick)
    gr.api(page.run(generate), api_name="generate", **page.concurrency)
    gr.api(page.run(cancel), api_name="cancel", queue=False)


def checked_sizes(sizes: dict[str, Any] | None) -> dict[str, Any]:
    """Settings of a pipeline call that visitors may set.

    Raises: TypeError for others.
    """
    from .generating import SIZES

    if sizes is not None and not isinstance(sizes, dict):
        raise TypeError(f"sizes must be a mapping, got {type(sizes).__name__}")
    for name in sizes or {}:
        if name not in SIZES:
            raise TypeError(f"sizes may hold {', '.join(SIZES)}, got {str(name)[:40]!r}")
    return {name: value for name, value in (sizes or {}).items() if value is not None}


def _file(run: Any, address: str) -> dict[str, Any]:
    """A published file as Gradio's clients fetch it."""
    path = run.file(address.rsplit("/", 1)[1])
    return dict(gr.FileData(path=str(path), orig_name=path.name).model_dump())
