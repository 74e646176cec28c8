"""The published file formats of the benchmarks, on small files of the same form."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from video_files import clip, level

from mmeff import video_io
from mmeff.evaluation.datasets import open_dataset
from mmeff.evaluation.datasets.mvbench import TASKS
from mmeff.evaluation.datasets.vbench import DIMENSIONS, SHARED
from mmeff.evaluation.media import read_media


@pytest.fixture(scope="module")
def a_clip(tmp_path_factory):
    """Two seconds at ten frames a second."""
    return video_io.write(tmp_path_factory.mktemp("clip") / "a.mp4", clip(20), fps=10)


@pytest.fixture
def place(a_clip):
    """Put a clip somewhere, with the folders on the way."""

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(a_clip, path)

    return put


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow", reason="pyarrow, of mmeff[data], is not installed")
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


# ---------------------------------------------------------------- Video-MME

MME = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
    "task_type": "Counting Problem", "question": "How many lamps are lit?", "answer": "C",
    "options": ["A. None.", "B. Two.", "C. A. and B.", "D. Four."],
}  # fmt: skip


@pytest.fixture
def mme(tmp_path, place):
    long = {
        **MME,
        "question_id": "601-3",
        "duration": "long",
        "videoID": "-x_y",
        "task_type": "OCR Problems",
        "answer": "A",
    }
    parquet(tmp_path / "videomme" / "test-00000-of-00001.parquet", [MME, long])
    place(tmp_path / "data" / "fFjv93ACGo8.mp4")
    place(tmp_path / "data" / "-x_y.MP4")
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "fFjv93ACGo8.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n")
    return tmp_path


def test_video_mme_as_on_the_hub(mme):
    first, second = open_dataset(f"video_mme:{mme}")
    assert (first.id, first.answer, first.category) == ("001-1", "C", "Counting Problem")
    assert first.options == ("None.", "Two.", "A. and B.", "Four.") and first.answer_text == "A. and B."
    assert "\nC. A. and B.\n" in first.prompt and first.prompt.startswith("How many lamps are lit?\nA. None.")
    assert first.meta["duration"] == "short" and first.meta["subtitles"] == "subtitle/fFjv93ACGo8.srt"
    assert second.media[0].path.endswith("-x_y.MP4") and "subtitles" not in second.meta
    assert len(read_media(second.media[0], num_frames=3)) == 3
    assert [s.id for s in open_dataset(f"video_mme:{mme}", durations="long")] == ["601-3"]
    with pytest.raises(
        ValueError, match=r"duration 'lnog' is not there; known are short, medium, long\. Did you mean 'long'"
    ):
        open_dataset(f"video_mme:{mme}", durations=["short", "lnog"])
    moved = mme.with_name("elsewhere")
    digest = open_dataset(f"video_mme:{mme}").digest
    shutil.move(mme, moved)
    assert open_dataset(f"video_mme:{moved}").digest == digest


def test_video_mme_as_the_authors_wrote_it(tmp_path, place):
    questions = [{k: MME[k] for k in ("question_id", "task_type", "question", "answer")} | {"choices": MME["options"]}]
    about = {"video_id": "001", "duration_category": "medium", "video_category": "K", "video_sub_category": "H"}
    dump(tmp_path / "video_mme.json", [{**about, "url": MME["url"] + "&t=3", "questions": questions}])
    place(tmp_path / "videos" / "fFjv93ACGo8.mp4")
    (sample,) = open_dataset(f"video_mme:{tmp_path}")
    assert sample.answer == "C" and sample.media[0].path == str(tmp_path / "videos" / "fFjv93ACGo8.mp4")
    assert sample.meta["duration"] == "medium"
    (again,) = open_dataset(f"video_mme:{tmp_path / 'video_mme.json'}")
    assert again == sample


def test_video_mme_with_other_columns(tmp_path):
    parquet(tmp_path / "a.parquet", [{"videoId": "x", "question": "?", "option": ["a", "b"]}])
    with pytest.raises(
        ValueError,
        match=r"misses 8 columns: videoID\. Did you mean 'videoId'\?; .*options\. Did you mean 'option'\?; answer",
    ):
        open_dataset(f"video_mme:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no annotations; expected videomme/\*\.parquet or"):
        open_dataset(f"video_mme:{tmp_path / 'empty'}")


# ---------------------------------------------------------------- MVBench


@pytest.fixture
def mvbench(tmp_path, place):
    both = {"question": "What happened?", "candidates": ["The door", "The bag"], "answer": "The bag"}
    dump(tmp_path / "json" / "action_sequence.json", [{"video": "ZS9XR.mp4", "start": 0.5, "end": 1.0, **both}] * 2)
    dump(tmp_path / "json" / "object_shuffle.json", [{"video": "video_1.mp4", **both}])
    dump(tmp_path / "json" / "fine_grained_pose.json", [{"video": "S001_rgb.avi", **both}])
    dump(
        tmp_path / "json" / "episodic_reasoning.json",
        [{"video": "castle_s07e22_clip_12", "subtitle": "Hello.", "start": 1.0, "end": 3.0, **both}],
    )
    place(tmp_path / "video" / "data0613" / "star" / "Charades_v1_480" / "ZS9XR.mp4")
    place(tmp_path / "video" / "perception" / "videos" / "video_1.mp4")
    place(tmp_path / "video" / "nturgbd_convert" / "S001_rgb.mp4")
    frames = tmp_path / "video" / "tvqa" / "frames_fps3_hq" / "castle_s07e22_clip_12"
    frames.mkdir(parents=True)
    for i, frame in enumerate(clip(12)):
        Image.fromarray(frame).save(frames / f"{i + 1:05}.jpg", quality=95)
    return tmp_path


def test_mvbench_mixes_videos_frames_and_cuts(mvbench):
    dataset = open_dataset(f"mvbench:{mvbench}")
    assert [s.id for s in dataset] == [
        "action_sequence-0000", "action_sequence-0001", "object_shuffle-0000", "fine_grained_pose-0000",
        "episodic_reasoning-0000",
    ]  # fmt: skip
    assert {s.answer for s in dataset} == {"B"} and dataset[0].category == "action_sequence"
    cut, whole, converted, frames = (dataset[i].media[0] for i in (0, 2, 3, 4))
    assert (cut.start, cut.end) == (0.5, 1.0) and read_media(cut).indices.tolist() == [5, 6, 7, 8, 9]
    assert whole.start is None and len(read_media(whole)) == 20
    assert converted.path.endswith("nturgbd_convert/S001_rgb.mp4")
    video = read_media(frames)
    assert video.indices.tolist() == [3, 4, 5, 6, 7, 8] and [level(f) for f in video.frames] == [3, 4, 5, 6, 7, 8]
    assert frames.fps == 3 and dataset[4].meta["subtitle"] == "Hello."


def test_mvbench_tasks_are_chosen_by_name(mvbench):
    assert [s.category for s in open_dataset(f"mvbench:{mvbench}", tasks="object_shuffle")] == ["object_shuffle"]
    with pytest.raises(ValueError, match=r"MVBench task 'object_shufle' is not there; .*Did you mean 'object_shuffle'"):
        open_dataset(f"mvbench:{mvbench}", tasks=["object_shufle"])
    (mvbench / "json").rename(mvbench / "jsons")
    with pytest.raises(FileNotFoundError, match=r"holds no MVBench annotations; expected json/action_sequence\.json"):
        open_dataset(f"mvbench:{mvbench}")


def test_mvbench_uses_ready_cuts_where_only_they_are_there(mvbench):
    shutil.move(
        mvbench / "video" / "data0613" / "star" / "Charades_v1_480", mvbench / "video" / "star" / "Charades_segment"
    )
    media = open_dataset(f"mvbench:{mvbench}", tasks="action_sequence")[0].media[0]
    assert (
        media.path.endswith("star/Charades_segment/ZS9XR.mp4") and media.start is None and len(read_media(media)) == 20
    )


def test_mvbench_rows_without_a_cut(mvbench):
    row = {"video": "ZS9XR.mp4", "question": "?", "candidates": ["a", "b"], "answer": "c"}
    dump(mvbench / "json" / "action_sequence.json", [row])
    with pytest.raises(ValueError, match=r"action_sequence\.json misses 2 columns: start; end"):
        open_dataset(f"mvbench:{mvbench}")
    dump(mvbench / "json" / "action_sequence.json", [{**row, "start": 0, "end": 1}])
    odd = open_dataset(f"mvbench:{mvbench}", tasks="action_sequence")
    assert odd[0].answer is None  # asked, and not scored
    assert "one sample of MVBench has no published answer among the options, action_sequence-0000" in odd.notes[0]


def test_mvbench_has_twenty_tasks():
    assert len(TASKS) == 20 and sum(source.cut for source in TASKS.values()) == 5


# ---------------------------------------------------------------- LongVideoBench

LVB = {
    "video_id": "86CxyhFV9MI", "video_path": "86CxyhFV9MI.mp4", "question": "At the yellow sign, who stands left?",
    "question_wo_referring_query": "Who stands left?", "candidates": ["A man", "A dog", "Nobody"], "correct_choice": 1,
    "position": [854], "topic_category": "NP-News-Programs", "question_category": "TOS", "level": "L2-Relation",
    "id": "86CxyhFV9MI_0", "subtitle_path": "86CxyhFV9MI_en.json", "duration_group": 600, "duration": 190.16,
    "starting_timestamp_for_subtitles": 0, "view_count": 12,
}  # fmt: skip


def test_longvideobench(tmp_path, place):
    dump(tmp_path / "lvb_val.json", [LVB])
    dump(tmp_path / "lvb_test_wo_gt.json", [{k: v for k, v in LVB.items() if k != "correct_choice"}])
    place(tmp_path / "videos" / "86CxyhFV9MI.mp4")
    (sample,) = open_dataset(f"longvideobench:{tmp_path}")
    assert (sample.id, sample.answer, sample.category) == ("86CxyhFV9MI_0", "B", "TOS")
    assert sample.meta["duration_group"] == 600 and sample.meta["subtitles"] == "subtitles/86CxyhFV9MI_en.json"
    (held_back,) = open_dataset(f"longvideobench:{tmp_path}", split="test")
    assert held_back.answer is None and held_back.options == sample.options
    with pytest.raises(
        ValueError, match=r"split of LongVideoBench must be val or test, got 'vall'\. Did you mean 'val'"
    ):
        open_dataset(f"longvideobench:{tmp_path}", split="vall")


def test_longvideobench_as_parquet_and_with_a_choice_that_is_none(tmp_path, place):
    row = {k: v for k, v in LVB.items() if k != "candidates"}
    texts = ["A man", "A dog", "N/A", "N/A", "N/A"]
    parquet(tmp_path / "validation-00000-of-00001.parquet", [{**row, **{f"option{i}": t for i, t in enumerate(texts)}}])
    place(tmp_path / "videos" / "86CxyhFV9MI.mp4")
    assert open_dataset(f"longvideobench:{tmp_path}")[0].options == ("A man", "A dog")
    dump(tmp_path / "lvb_val.json", [{**LVB, "correct_choice": 3}])
    with pytest.raises(ValueError, match=r"correct_choice of .*86CxyhFV9MI_0 must be in \[0, 2\], or -1 .* got 3"):
        open_dataset(f"longvideobench:{tmp_path}")


# ---------------------------------------------------------------- MLVU


def test_mlvu(tmp_path, place):
    order = {
        "video": "order_126.mp4", "duration": 665.34, "question": "In which order?", "candidates": ["1->2", "2->1"],
        "answer": "2->1", "question_type": "order",
    }  # fmt: skip
    summary = {
        "video": "217.mp4",
        "duration": 480.0,
        "question": "Summarise.",
        "answer": "Waves.",
        "question_type": "summary",
    }
    points = {**summary, "video": "8.mp4", "question_type": "subPlot", "scoring_points": "a boat;two whales"}
    root = tmp_path / "MLVU"
    faulty = [
        {**order, "answer": ""},
        {**order, "answer": "3->4"},
        {**order, "question": ""},
    ]  # the published files have such
    dump(root / "json" / "5_order.json", [order, *faulty])
    dump(root / "json" / "8_sub_scene.json", [points])
    dump(root / "json" / "9_summary.json", [summary])
    place(root / "video" / "5_order" / "order_126.mp4")
    place(root / "video" / "summary" / "217.mp4")  # as in the first release
    dataset = open_dataset(f"mlvu:{tmp_path}")
    assert [(s.id, s.category, s.answer) for s in dataset] == [
        ("5_order-0000", "order", "B"), ("5_order-0001", "order", None), ("5_order-0002", "order", None),
        ("8_sub_scene-0000", "subPlot", "Waves."), ("9_summary-0000", "summary", "Waves."),
    ]  # fmt: skip
    assert dataset[4].options == () and dataset[4].prompt == "Summarise." and dataset[0].meta["duration"] == 665.34
    assert dataset[3].meta["scoring_points"] == "a boat;two whales"
    assert dataset[4].media[0].path == str(root / "video" / "summary" / "217.mp4")
    odd, missing = dataset.notes
    assert "2 samples of MLVU dev have no published answer among the options, 5_order-0001" in odd
    assert "1 of 3 media files of MLVU dev are missing" in missing and "8_sub_scene/8.mp4" in missing
    assert [s.id for s in open_dataset(f"mlvu:{root}", tasks="order")] == [
        "5_order-0000",
        "5_order-0001",
        "5_order-0002",
    ]
    with pytest.raises(ValueError, match=r"MLVU task 'ordre' is not there; known are 5_order, 8_sub_scene, 9_summary"):
        open_dataset(f"mlvu:{tmp_path}", tasks="ordre")


def test_mlvu_test_set(tmp_path, place):
    row = {
        "question_id": "AR_0", "video": "test_AR-1.mp4", "duration": 300, "question": "Which?", "candidates": ["x", "y", "z"],
        "question_type": "anomaly_reco",
    }  # fmt: skip
    dump(tmp_path / "test_multi_choice_tasks.json", [row])
    place(tmp_path / "MLVU_Test" / "video" / "test_AR-1.mp4")
    (held_back,) = open_dataset(f"mlvu:{tmp_path}", split="test")
    assert held_back.id == "AR_0" and held_back.answer is None
    dump(tmp_path / "test-ground-truth" / "test_mcq_gt.json", [{**row, "answer": "z"}])
    assert open_dataset(f"mlvu:{tmp_path}", split="test")[0].answer == "C"
    with pytest.raises(ValueError, match="one file for all tasks; leave tasks out"):
        open_dataset(f"mlvu:{tmp_path}", split="test", tasks="order")


# ---------------------------------------------------------------- NExT-QA

MC = """video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
4010069381,369,640,480,how do the two man play,0,6,CH,roll the handle,tap their feet,strum the string,hit with sticks,pat
4010069381,369,640,480,"why, then",4,7,CW,no,no,yes,maybe,no
"""
OE = """video,frame_count,width,height,question,answer,qid,type
4010069381,369,640,480,where is this,a garden,2,DL
4010069381,369,640,480,what did he do next,sit down,3,TN
"""


def test_nextqa_multiple_choice(tmp_path, place):
    folder = tmp_path / "nextqa"
    folder.mkdir()
    (folder / "val.csv").write_text(MC)
    dump(folder / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    place(tmp_path / "NExTVideo" / "1164" / "4010069381.mp4")
    first, second = open_dataset(f"nextqa:{tmp_path}")
    assert (first.id, first.answer, first.category) == ("4010069381_6", "A", "causal how")
    assert second.answer == "E" and second.answer_text == "no" and second.meta["question"] == "why, then"
    assert first.media[0].path == str(tmp_path / "NExTVideo" / "1164" / "4010069381.mp4")


def test_nextqa_open_answers(tmp_path, place):
    (tmp_path / "test.csv").write_text(OE)
    dump(tmp_path / "add_reference_answer_test.json", {"4010069381": {"2": "yard"}})
    place(tmp_path / "NExTVideo" / "4010069381.mp4")  # as on the hub, without numbered folders
    first, second = open_dataset(f"nextqa:{tmp_path}", split="test", form="oe")
    assert first.options == () and first.answer == "a garden" and first.meta["references"] == ["a garden", "yard"]
    assert second.meta["references"] == ["sit down"] and first.media[0].path.endswith("NExTVideo/4010069381.mp4")
    with pytest.raises(ValueError, match=r"test\.csv misses 5 columns: a0; .*a4 \(it has video, frame_count"):
        open_dataset(f"nextqa:{tmp_path}", split="test")
    with pytest.raises(ValueError, match="form of NExT-QA must be mc or oe, got 'open'"):
        open_dataset(f"nextqa:{tmp_path}", split="test", form="open")
    with pytest.raises(
        FileNotFoundError, match=r"no annotations of the split val; expected val\.csv or nextqa/val\.csv"
    ):
        open_dataset(f"nextqa:{tmp_path}")


def test_nextqa_as_parquet_and_with_wrong_answers(tmp_path, place):
    row = dict(zip(MC.splitlines()[0].split(","), MC.splitlines()[1].split(","), strict=True)) | {"answer": 3}
    parquet(tmp_path / "MC" / "test-00000-of-00001.parquet", [row])
    place(tmp_path / "NExTVideo" / "4010069381.mp4")
    assert open_dataset(f"nextqa:{tmp_path}", split="test")[0].answer == "D"
    (tmp_path / "val.csv").write_text(MC.replace(",4,7,CW", ",five,7,CW"))
    with pytest.raises(ValueError, match=r"val\.csv, 4010069381_7 must be the number of an option, 0 to 4, got 'five'"):
        open_dataset(f"nextqa:{tmp_path}")


# ---------------------------------------------------------------- VBench


def test_vbench_prompt_file(tmp_path):
    (tmp_path / "all_dimension.txt").write_text("In a still frame, a stop sign\n\na bird.\n")
    dataset = open_dataset(tmp_path / "all_dimension.txt")
    assert len(dataset) == 10 and {s.task for s in dataset} == {"generate"}
    assert dataset[7].id == "a bird.-2" and dataset[7].prompt == "a bird." and dataset[7].meta["number"] == 2
    assert len({s.seed for s in dataset}) == 10
    again = open_dataset(tmp_path / "all_dimension.txt", samples=1)
    assert [s.seed for s in again] == [dataset[0].seed, dataset[5].seed]  # a video keeps its noise
    assert open_dataset(tmp_path / "all_dimension.txt", seed=1)[0].seed != dataset[0].seed
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    twice = open_dataset(tmp_path / "twice.txt")  # as VBench's own list does
    assert len(twice) == 10 and "1 lines of" in twice.notes[0]
    with pytest.raises(ValueError, match=r"is a plain list that knows no dimensions"):
        open_dataset(tmp_path / "all_dimension.txt", dimensions="color")
    for wrong in (0, 2.0):
        with pytest.raises(ValueError, match="samples must be a positive number of videos of each prompt"):
            open_dataset(tmp_path / "all_dimension.txt", samples=wrong)


def test_vbench_lists_of_dimensions(tmp_path):
    lists = tmp_path / "prompts" / "prompts_per_dimension"
    lists.mkdir(parents=True)
    (lists / "scene.txt").write_text("alley\n")
    (lists / "temporal_flickering.txt").write_text("In a still frame, a stop sign\nalley\n")
    dataset = open_dataset(f"vbench:{tmp_path}")
    by_prompt = {s.prompt: s for s in dataset}
    assert by_prompt["alley"].meta["dimensions"] == ["background_consistency", "temporal_flickering", "scene"]
    assert len(dataset) == 50  # both serve temporal flickering
    scenes = open_dataset(f"vbench:{lists}", dimensions=["background_consistency", "scene"])
    assert len(scenes) == 5 and scenes[0].category == "background_consistency"
    with pytest.raises(ValueError, match=r"VBench has no dimension 'colour'; .*Did you mean 'color'"):
        open_dataset(f"vbench:{tmp_path}", dimensions="colour")
    with pytest.raises(FileNotFoundError, match=r"holds no overall_consistency\.txt, the prompts of imaging_quality"):
        open_dataset(f"vbench:{tmp_path}", dimensions="imaging_quality")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no lists of VBench"):
        open_dataset(f"vbench:{tmp_path / 'none'}")


def test_vbench_full_info(tmp_path):
    info = [
        {"prompt_en": "a bird", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "bird"}}},
        {"prompt_en": "a cat runs", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    ]
    dump(tmp_path / "VBench_full_info.json", info)
    dataset = open_dataset(f"vbench:{tmp_path / 'VBench_full_info.json'}")
    assert len(dataset) == 10 and dataset[0].meta["auxiliary_info"] == {"object_class": {"object": "bird"}}
    some = open_dataset(f"vbench:{tmp_path / 'VBench_full_info.json'}", dimensions="dynamic_degree")
    assert {s.prompt for s in some} == {"a cat runs"} and some[0].category == "dynamic_degree"
    with pytest.raises(ValueError, match="has no prompt of color"):
        open_dataset(f"vbench:{tmp_path / 'VBench_full_info.json'}", dimensions="color")


def test_vbench_has_sixteen_dimensions():
    assert len(DIMENSIONS) == 16 and set(SHARED) | set(SHARED.values()) <= set(DIMENSIONS)
