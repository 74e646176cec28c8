"""HunyuanVideoHost: the contract of all hosts, and what is HunyuanVideo's own."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import small_hunyuan_video as kit
import torch
from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from host_contract import GRID, SPARSE, TOLERANCE, HostContract
from masked_stock import masked_attentions

import mmeff
from mmeff.diffusion_attn import Radial
from mmeff.diffusion_attn.hosts._hunyuan_video_attention import SparseHunyuanVideoProcessor
from mmeff.diffusion_attn.hosts.hunyuan_video import _IMAGE_TOKENS, HunyuanVideoHost


class TestHunyuanVideo(HostContract):
    kit = kit


@pytest.mark.parametrize(("kind", "tokens"), [("latent_concat", 284), ("token_replace", 140)])
def test_image_to_video(kind, tokens):
    """Its prompts begin with the tokens of the image, and its first frame is modulated, or its input is wider."""
    pipe = kit.make_image_pipe(kind)
    draw = torch.Generator().manual_seed(5)
    call = {
        "image": torch.rand(1, 3, 80, 80, generator=draw),
        "prompt": None,
        "prompt_embeds": torch.randn(1, kit.TEXT_TOKENS, kit.TEXT_DIM, generator=draw),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=draw),
        "prompt_attention_mask": torch.tensor([[1] * 7 + [0] * 4]),
        "grid": GRID,
    }
    stock = kit.generate(pipe, **call)
    with masked_attentions(kit.attentions(pipe.transformer), SPARSE, grid=GRID, text_len=kit.TEXT_TOKENS):
        expected = kit.generate(pipe, **call)
    with mmeff.accelerate(pipe, SPARSE) as handle:
        out = kit.generate(pipe, **call)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert (out - stock).abs().max() > 1e-3
    assert handle.report().calls == {"sparse": 2 * kit.LAYERS, "full": 0, "dense": 0}
    plan = mmeff.plan(pipe, SPARSE, num_inference_steps=2, text_tokens=256, **kit.plan_sizes(GRID))
    assert plan.layouts["video"].q_len == 100 + 256 + tokens
    assert dict(plan.rows)["image tokens"].startswith(f"{tokens} beside the text")


def test_the_tokens_of_the_image_are_counted_as_the_pipeline_makes_them():
    """The pipeline's own encoding, around a tokenizer and a model that only say how many tokens there are."""

    class Tokenizer:
        def __call__(self, prompts, max_length, **options):
            ids = torch.full((len(prompts), max_length), 9)
            ids[:, 5] = IMAGE
            ids[:, [0, 100, 120]] = HEADER
            return SimpleNamespace(input_ids=ids, attention_mask=(torch.arange(max_length) < 125).int().expand_as(ids))

        def convert_tokens_to_ids(self, token):
            return HEADER

    IMAGE, HEADER = 77, 50
    encoder = mock.Mock(dtype=torch.float32, config=SimpleNamespace(image_token_index=IMAGE, pad_token_id=0))
    encoder.side_effect = lambda input_ids, **_: SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 4)] * 4)
    pixels = mock.Mock(return_value=SimpleNamespace(pixel_values=torch.zeros(1)))
    parts = SimpleNamespace(
        text_encoder=encoder, tokenizer=Tokenizer(), image_processor=pixels, _execution_device=torch.device("cpu")
    )
    for kind, interleave in (("latent_concat", 2), ("token_replace", 4)):
        embeds, mask = HunyuanVideoImageToVideoPipeline._get_llama_prompt_embeds(
            parts, None, ["a prompt"], DEFAULT_PROMPT_TEMPLATE, 1, image_embed_interleave=interleave
        )
        assert embeds.shape[1] == mask.shape[1] == 256 + _IMAGE_TOKENS[kind]
        assert (mask.diff(dim=1) <= 0).all()  # ones first


def test_the_token_refiner_is_left_alone():
    transformer = kit.make_transformer()
    refiner = [m for m in transformer.context_embedder.modules() if hasattr(m, "processor")]
    before = [m.processor for m in refiner]
    with mmeff.accelerate(transformer, SPARSE):
        assert before and [m.processor for m in refiner] == before
        names = [name for name, _ in HunyuanVideoHost.attentions(transformer)]
    assert names == [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in (0, 1)]


def test_text_in_use_is_counted_in_any_dtype_of_the_mask():
    """The pipeline casts the mask to the transformer's dtype, in which a sum of ones stops at 256."""
    transformer = kit.make_transformer()
    mask = (torch.arange(400) < torch.tensor([[301], [7]])).bfloat16()
    args = (torch.zeros(2, 4, 3, 8, 6), torch.zeros(2), torch.zeros(2, 400, kit.TEXT_DIM))
    for passed in (((*args, mask), {}), (args, {"encoder_attention_mask": mask})):
        grid, text_len, device, valid = HunyuanVideoHost.sizes(transformer, *passed)
        assert (grid, text_len, device.type, valid.tolist()) == ((3, 4, 3), 400, "cpu", [301, 7])
    assert HunyuanVideoHost.sizes(transformer, args, {"encoder_attention_mask": mask[:1]})[3].tolist() == [301, 301]


def test_calls_that_cannot_be_sparse_run_dense_and_say_why():
    transformer = kit.make_transformer()
    attention = kit.attentions(transformer)[0]
    stock = attention.processor
    video, text = torch.randn(2, 100, 32), torch.randn(2, kit.TEXT_TOKENS, 32)
    padding = torch.ones(2, 1, 1, 111, dtype=torch.bool)
    cases = [
        ((video, text, padding.expand(2, 1, 111, 111).tril()), "another mask"),
        ((video, text, None), "another mask"),
        ((video, None, None), "without its text"),
        ((video[:, :20], text, padding[..., :31]), "31 tokens"),
    ]

    def call_oddly(module, args):  # before the block's own call
        for call, _ in cases:
            for ours, theirs in zip(attention.processor(attention, *call), stock(attention, *call), strict=True):
                assert ours is theirs is None or torch.equal(ours, theirs)

    with torch.no_grad(), mmeff.accelerate(transformer, SPARSE) as handle:
        hook = transformer.transformer_blocks[0].register_forward_pre_hook(call_oddly)
        kit.forward(transformer, GRID)
        hook.remove()
    report = handle.report()
    assert report.layers[0]["dense"] == 4 and report.layers[0]["sparse"] == 1
    assert {words: sum(n for r, n in report.fallbacks.items() if words in r) for _, words in cases} == {
        "another mask": 2, "without its text": 1, "31 tokens": 1
    }  # fmt: skip


def test_tokens_split_over_processes_are_not_sparse():
    ours = SparseHunyuanVideoProcessor(HunyuanVideoAttnProcessor2_0(), 0, mock.Mock())
    call = {"encoder_hidden_states": torch.zeros(1, 3, 8), "attention_mask": torch.ones(1, 1, 1, 9).bool()}
    assert ours.obstacle(call) is None
    context = mock.Mock(ulysses_degree=2, ring_degree=1, ulysses_anything=False)
    ours._parallel_config = mock.Mock(context_parallel_config=context)
    assert "interleaved" in ours.obstacle(call)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"height": 90}, "height=90 is not a multiple of 16 pixels, which the pipeline refuses"),
        ({"num_frames": 12}, "num_frames=12 is not 1 + a multiple of 4: the pipeline makes it 9"),
    ],
)
def test_a_plan_lists_reasons_instead_of_raising(sizes, reason):
    pipe = kit.make_pipe()
    plan = mmeff.plan(pipe, SPARSE, **{**kit.plan_sizes(GRID), **sizes})
    assert plan.fallbacks == (reason,)
    if "num_frames" in sizes:
        out = kit.generate(pipe, grid=GRID, steps=1, num_frames=12, output="np")
        assert out.shape[1] == 9 and dict(plan.rows)["video"] == "9 frames of 80 x 80 pixels"


def test_the_plan_of_the_released_model():
    """129 frames of 720 x 1280 pixels: 118,800 video tokens and 256 of text, as the paper has it."""
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=2)
    plan = mmeff.plan(transformer, Radial(dense_steps=0, dense_layers=0, sink=False, decay=0.95))
    rows = dict(plan.rows)
    assert rows["grid"] == "33 x 45 x 80 = 118800 video tokens, 256 text tokens in self-attention"
    assert plan.density < 0.5 and plan.predicted_speedup > 1.5
