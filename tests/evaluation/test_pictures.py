"""Pictures: what is drawn where, and what is refused."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mmeff.evaluation import pictures
from mmeff.evaluation.pictures import CurvePoint
from mmeff.kernels import BlockLayout
from mmeff.report import TokenPlaces


def flat(colour, T=4, H=48, W=48):
    return np.broadcast_to(np.array(colour, np.uint8), (T, H, W, 3)).copy()


def share(image, colour, tolerance=40):
    """Which part of an image is near a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(np.asarray(image).astype(int) - wanted).max(-1) <= tolerance).mean())


# ---------------------------------------------------------------- frames


def test_side_by_side_enlarges_by_whole_pixels_and_keeps_sides_apart():
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, 255, (3, 48, 48, 3), dtype=np.uint8) for _ in range(2))
    frames = pictures.side_by_side(left, right, ("dense", "fast"))
    T, H, W, _ = frames.shape
    assert frames.dtype == np.uint8 and T == 3 and H % 2 == 0 and W % 2 == 0 and H >= 240
    for video, side in ((left, 0), (right, 1)):
        big = video.repeat(5, 1).repeat(5, 2)
        x = 8 + side * (240 + 8)
        y = H - 240 - 8
        assert any(np.array_equal(frames[:, row : row + 240, x : x + 240], big) for row in range(y - 2, y + 3))


def test_side_by_side_does_not_shrink_large_videos():
    frames = pictures.side_by_side(flat((1, 2, 3), H=300, W=20), flat((1, 2, 3), H=300, W=20))
    assert (frames == (1, 2, 3)).all(-1).any(2).sum(1).tolist() == [300] * 4


def test_captions_are_drawn_wrapped_and_cut():
    black = flat((0, 0, 0))
    short = pictures.side_by_side(black, black, ("a", "b"))
    none = pictures.side_by_side(black, black, ("", ""))
    assert not np.array_equal(short, none)
    long = pictures.side_by_side(black, black, ("dense", "a method with a great many " + "parameters, " * 40))
    assert long.shape[2] == short.shape[2] and long.shape[1] > short.shape[1]  # two lines at most, the panels as wide
    font = pictures._font(14)
    assert pictures._fitted("x" * 300, font, 100).endswith("…") and pictures._fitted("x", font, 100) == "x"
    assert len(pictures._wrapped("word " * 100, font, 100)) == 2
    assert all(font.getlength(line) <= 100 for line in pictures._wrapped("word " * 100, font, 100))


def test_side_by_side_of_different_videos():
    with pytest.raises(ValueError, match=r"two videos of one shape, got \(4, 48, 48, 3\) and \(5, 48, 48, 3\)"):
        pictures.side_by_side(flat((0, 0, 0)), flat((0, 0, 0), T=5))


def test_side_by_side_fits_the_writer(tmp_path):
    from mmeff import video_io

    frames = pictures.side_by_side(flat((200, 0, 0), H=47, W=49), flat((0, 0, 200), H=47, W=49))
    file = video_io.write(tmp_path / "pair.mp4", frames)
    assert video_io.read(file).frames.shape == frames.shape


def test_strip_shows_the_same_moment_in_a_column():
    T = 17
    count_up = np.stack([np.full((48, 48, 3), 10 * t + 20, np.uint8) for t in range(T)])
    sheet = np.asarray(pictures.strip({"dense": count_up, "other": count_up, "half": count_up[:, :24, :24]}, count=5))
    for t in (0, 4, 8, 12, 16):
        ys, xs = np.where((sheet == 10 * t + 20).all(-1))
        # three tiles of 96 pixels stand above each other
        assert len(np.unique(ys)) >= 3 * 96 and np.ptp(xs) < 110, t
    assert not (sheet == 10 * 3 + 20).all(-1).sum() > 500


def test_strip_of_a_short_video_has_fewer_columns():
    assert pictures.strip({"a": flat((9, 9, 9), T=1)}).width < pictures.strip({"a": flat((9, 9, 9), T=3)}).width


@pytest.mark.parametrize(
    ("videos", "count", "message"),
    [
        ({}, 8, "videos of one length, got none"),
        ({"a": flat((0, 0, 0)), "b": flat((0, 0, 0), T=3)}, 8, r"one length, got \{'a': 4, 'b': 3\}"),
        ({"a": flat((0, 0, 0))}, 0, "count >= 1 columns, got 0"),
    ],
)
def test_wrong_strips(videos, count, message):
    with pytest.raises(ValueError, match=message):
        pictures.strip(videos, count)


def grid_boxes(rows, columns, positions):
    return [
        [p % columns / columns, p // columns / rows, (p % columns + 1) / columns, (p // columns + 1) / rows]
        for p in positions
    ]


def test_kept_overlay_keeps_what_is_kept():
    image = np.full((60, 80, 3), 200, np.uint8)
    out = np.asarray(pictures.kept_overlay(image, torch.tensor(grid_boxes(3, 4, [0, 5])), min_height=60))
    assert out.shape == (60, 80, 3)
    cells = out.reshape(3, 20, 4, 20, 3)[:, 5:15, :, 5:15].mean((1, 3, 4))
    assert cells[0, 0] == cells[1, 1] == 200
    cells[0, 0] = cells[1, 1] = 0
    assert cells.max() < 120


def test_kept_overlay_covers_images_that_the_grid_does_not_divide():
    image = Image.new("RGB", (50, 37), (255, 255, 255))
    everything = np.asarray(pictures.kept_overlay(image, grid_boxes(24, 24, range(24 * 24))))
    assert (everything == 255).all() and everything.shape[0] >= 336
    nothing = np.asarray(pictures.kept_overlay(image, []))
    assert (nothing < 120).all()


@pytest.mark.parametrize("box", [[0, 0, 1, 1.2], [-0.1, 0, 1, 1], [0.5, 0, 0.4, 1], [0, float("nan"), 1, 1]])
def test_boxes_outside_the_image(box):
    with pytest.raises(ValueError, match=r"boxes must be \(left, top, right, bottom\) in \[0, 1\], got values from"):
        pictures.kept_overlay(np.zeros((9, 9, 3), np.uint8), [[0, 0, 1, 1], box])


# ---------------------------------------------------------------- charts


def band(n=24, width=2):
    i = np.arange(n)
    return np.abs(i[:, None] - i) <= width


def inside(image):
    """The plot area of a density map, without its labels: where the two extreme shades are."""
    pixels = np.asarray(image).astype(int)
    return share(image, "#0a3f66", 6), share(image, "#f3f5f8", 6), pixels.shape


def test_density_map_draws_the_mask():
    mask = band()
    dark, light, _ = inside(pictures.density_map(mask))
    assert dark / (dark + light) == pytest.approx(mask.mean(), abs=0.02)


def test_density_map_of_a_layout_is_that_of_its_mask():
    mask = torch.from_numpy(band()).repeat(1, 2, 1, 1)
    mask[:, 1] = True
    layout = BlockLayout.from_block_mask(mask, q_len=24 * 16 - 3, kv_len=24 * 16 - 3, q_block=16, kv_block=16)
    first, second = (pictures.density_map(layout, head=h, title="t") for h in (0, 1))
    assert inside(first)[0] < 0.5 * inside(second)[0]
    mean = pictures.density_map(layout, title="t")
    assert share(mean, "#a9cde6", 60) > share(first, "#a9cde6", 60)  # visited by one head of two: a middle shade
    with pytest.raises(ValueError, match=r"head must be in \[0, 1\] for this layout, got 2"):
        pictures.density_map(layout, head=2)


def test_frame_lines():
    plain, lined = pictures.density_map(band()), pictures.density_map(band(), frames=4)
    assert share(lined, pictures.COLOURS[1]) > share(plain, pictures.COLOURS[1])
    more = pictures.density_map(band(), frames=4, text_blocks=1.5)
    assert share(more, pictures.COLOURS[1]) > share(lined, pictures.COLOURS[1])  # the border to the text as well


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 3, 4)), r"2-D mask \(nQ, nK\), got shape \(2, 3, 4\)"),
        (np.zeros((0, 3)), r"got shape \(0, 3\)"),
        (np.full((2, 2), 3.0), r"values in \[0, 1\], got \[3, 3\]"),
        (np.full((2, 2), np.nan), r"values in \[0, 1\]"),
    ],
)
def test_wrong_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        pictures.density_map(mask)


def points():
    return [
        CurvePoint(policy=policy, tokens=tokens, accuracy=accuracy, questions=400)
        for policy, row in (("random", (0.45, 0.6, 0.8)), ("AdaptInfer", (0.8, 0.85, 0.88)))
        for tokens, accuracy in zip((9, 18, 72), row, strict=True)
    ]


def test_accuracy_curve_draws_every_policy_and_the_dense_level():
    dense = CurvePoint(policy="dense", tokens=144, accuracy=0.9, questions=400)
    with_dense, without = pictures.accuracy_curve(points(), dense=dense), pictures.accuracy_curve(points())
    for colour in pictures.COLOURS[:2]:
        assert share(with_dense, colour) > 1e-3
    assert share(with_dense, pictures.INK, 8) > share(without, pictures.INK, 8)
    assert with_dense.info["dpi"] == (pictures.DPI, pictures.DPI)
    assert pictures.accuracy_curve(points()[:1]).width > 0


def test_error_bars_are_binomial():
    assert CurvePoint(policy="p", tokens=1, accuracy=0.5, questions=100).standard_error == pytest.approx(0.05)
    assert CurvePoint(policy="p", tokens=1, accuracy=1.0, questions=100).standard_error == 0
    wide = [CurvePoint(policy="p", tokens=t, accuracy=0.5, questions=4) for t in (1, 2)]
    narrow = [CurvePoint(policy="p", tokens=t, accuracy=0.5, questions=10**6) for t in (1, 2)]
    assert not np.array_equal(pictures.accuracy_curve(wide), pictures.accuracy_curve(narrow))


def test_a_curve_of_nothing():
    with pytest.raises(ValueError, match="at least one point"):
        pictures.accuracy_curve([])


def test_time_split_areas_are_proportional():
    image = pictures.time_split({"dense": {"dense steps": 4.0}, "fast": {"dense steps": 1.0, "sparse steps": 2.0}})
    dense, sparse = (share(image, pictures.PHASES[p], 4) for p in ("dense steps", "sparse steps"))
    assert dense / sparse == pytest.approx(5 / 2, rel=0.1)


def test_phases_have_an_order_and_colours_of_their_own():
    phases = ["prefill", "decode", "tokenise", "selection", "other"]
    colours = pictures._phase_colours(phases)
    assert len(set(colours.values())) == 5 and colours["decode"] == pictures.PHASES["decode"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "got no times"),
        ({"a": {}}, "got no times"),
        ({"a": {"prefill": -1.0}}, r"got \[-1.0\]"),
        ({"a": {"prefill": math.nan}}, r"got \[nan\]"),
    ],
)
def test_wrong_times(rows, message):
    with pytest.raises(ValueError, match=message):
        pictures.time_split(rows)


def test_charts_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.time_split({"a": {"prefill": 0.0}})
    assert dict(matplotlib.rcParams) == before


def test_charts_need_no_main_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(pictures.density_map(band())))
    thread.start()
    thread.join()
    assert done


def places(pictures, tiles=0):
    """Of pictures of 2 x 2 tokens, behind which each has `tiles` x `tiles` tokens of tiles."""
    each = [*grid_boxes(2, 2, range(4)), *grid_boxes(tiles, tiles, range(tiles**2))]
    return TokenPlaces(
        np.repeat(np.arange(pictures), len(each)), np.array(each * pictures, np.float32),
        np.array(([False] * 4 + [True] * tiles**2) * pictures),
    )  # fmt: skip


def bright(image):
    return int((np.asarray(image) == (200, 40, 40)).all(-1).sum())


def test_kept_sheet_of_a_picture_and_of_a_video():
    frames = [flat((200, 40, 40), T=1)[0]] * 3
    whole = {0: range(12), 2: [0, 4, 9, -1]}
    one = pictures.kept_sheet(frames[:1], {2: [0, 3]}, places(1))
    clip = pictures.kept_sheet(frames, whole, places(3))
    assert one.width > 2 * 240 and one.height < 1.3 * one.width / 2, "stages stand beside each other"
    assert clip.height > 3 * 160, "stages stand below each other"
    frame = 192 * 192  # 48 pixels, enlarged by a whole factor to at least 160
    assert bright(clip) == pytest.approx((3 + 3 + 3 / 4) * frame, rel=0.02), "as seen, all kept, three of twelve kept"
    pairs = pictures.kept_sheet(frames[:1] * 6, whole, places(3))
    assert bright(pairs) == bright(clip), "a model that merges two frames has half as many pictures"


def test_kept_sheet_of_tiles():
    """A picture that is seen whole and in tiles stands twice; tokens whose places are not known are not drawn."""
    frame, mine = flat((200, 40, 40), T=1)[0], places(1, tiles=4)
    area = 192 * 192
    kept = {1: [0, 1, 2, 3, 4]}
    assert bright(pictures.kept_sheet([frame], kept, mine)) == pytest.approx((2 + 1 + 1 / 16) * area, rel=0.02)
    mine.box[4:] = np.nan
    assert bright(pictures.kept_sheet([frame], kept, mine)) == pytest.approx(2 * 240 * 240, rel=0.02)


def test_pictures_of_different_sizes_stand_in_one_sheet():
    frames = [np.full((h, w, 3), (200, 40, 40), np.uint8) for h, w in ((900, 300), (80, 160))]
    sheet = pictures.kept_sheet(frames, {1: range(8)}, places(2))
    areas = 160 * 53 + 160 * 320
    assert bright(sheet) == pytest.approx(2 * areas, rel=0.03)


@pytest.mark.parametrize(
    ("frames", "kept", "message"),
    [
        (0, {}, "a frame for each of 2 pictures, got 0"),
        (1, {}, "a frame for each of 2 pictures, got 1"),
        (2, {1: [8]}, r"in \[0, 7\] for 8 tokens, got 8 to 8"),
    ],
)
def test_wrong_kept_sheets(frames, kept, message):
    with pytest.raises(ValueError, match=message):
        pictures.kept_sheet([flat((9, 9, 9), T=1)[0]] * frames, kept, places(2))
