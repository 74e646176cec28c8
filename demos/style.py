"""Gradio's theme in the colours of the library's reports, with the fonts of the visitor's own system: nothing is fetched."""

from __future__ import annotations

from typing import Any


def theme() -> Any:
    """The theme of the page, light and dark."""
    import gradio as gr
    from gradio.themes import Color
    from gradio.themes.utils import colors, sizes

    blue = Color(
        c50="#eef6fc", c100="#d8eaf7", c200="#b0d4ee", c300="#7fb8e1", c400="#4698d0", c500="#1a7bbd", c600="#0072b2",
        c700="#045b8f", c800="#094b74", c900="#0c3d5e", c950="#08283f", name="mmeff",
    )  # fmt: skip
    made = gr.themes.Base(
        primary_hue=blue, secondary_hue=blue, neutral_hue=colors.slate, radius_size=sizes.radius_md, spacing_size=sizes.spacing_md,
        text_size=sizes.text_md, font=["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    )  # fmt: skip
    return made.set(
        body_background_fill="#f5f7fa", body_background_fill_dark="#0e1217",
        background_fill_primary="#ffffff", background_fill_primary_dark="#161b22",
        block_background_fill="#ffffff", block_background_fill_dark="#161b22",
        block_border_color="#dfe5ec", block_border_color_dark="#2b333d",
        border_color_primary="#dfe5ec", border_color_primary_dark="#2b333d",
        input_background_fill="#f8fafc", input_background_fill_dark="#0f141a",
        input_border_color="#cfd8e3", input_border_color_dark="#36404c",
        input_border_color_focus="#0072b2", input_border_color_focus_dark="#4698d0",
        button_primary_background_fill="#0072b2", button_primary_background_fill_hover="#045b8f",
        button_primary_background_fill_dark="#0072b2", button_primary_background_fill_hover_dark="#1a7bbd",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
        block_label_text_weight="600", block_title_text_weight="600", block_shadow="none",
        checkbox_label_background_fill="#f2f5f9", checkbox_label_background_fill_dark="#1c232c",
        checkbox_label_background_fill_hover="#e6ecf3", checkbox_label_background_fill_hover_dark="#242d38",
        checkbox_label_background_fill_selected="#d8eaf7", checkbox_label_background_fill_selected_dark="#0c3d5e",
        checkbox_label_border_width="1px", checkbox_label_border_color="#dfe5ec", checkbox_label_border_color_dark="#2b333d",
        button_secondary_background_fill="#e6ecf3", button_secondary_background_fill_dark="#242d38",
        button_secondary_background_fill_hover="#d8e1ea", button_secondary_background_fill_hover_dark="#2f3a47",
        block_radius="10px", input_radius="8px", block_title_text_color="#1c2128", block_title_text_color_dark="#e8edf3",
        block_info_text_color="#5a6472", block_info_text_color_dark="#9aa7b5", block_label_text_color="#5a6472",
        block_label_text_color_dark="#9aa7b5", body_text_color="#1c2128", body_text_color_dark="#e8edf3",
        button_large_radius="8px", button_small_radius="8px",
    )  # fmt: skip
