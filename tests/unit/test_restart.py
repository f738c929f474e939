"""Starting again, and being interrupted: what is finished is left, what is not is made, no file is half there."""

import pytest

from tests.unit.tiny_requests import NAMES, PICTURES, files, metadata, never, pictures


def test_stage_2_can_be_left_out_and_added(make):
    (first,) = make(stop_after=8)
    small = pictures(first)
    assert set(small) == {"sample_8.png", "sample_8.views.png"}
    assert list(first.pictures) == metadata(first)["sizes"] == [8]
    assert make(stop_after=8)[0].skipped
    (whole,) = make()
    assert not whole.skipped
    assert pictures(whole) == pictures(make("elsewhere"))
    assert small.items() < pictures(whole).items()
    (again,) = make(stop_after=8)  # is there, with more beside it
    assert again.skipped
    assert list(again.pictures) == [8]


def test_a_finished_seed_is_skipped_and_only_the_others_are_sampled(make):
    folder = make(seed=5)[0].folder
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (again,) = make(seed=5, on_step=never)
    assert again.skipped
    assert again.pictures == {8: folder / "sample_8.png", 32: folder / "sample_32.png"}
    seen = []
    made = make(seed=[4, 5, 6], on_step=lambda seeds, stage, state: seen.append(tuple(seeds)))
    assert [(anagram.seed, anagram.skipped) for anagram in made] == [(4, False), (5, True), (6, False)]
    assert set(seen) == {(4, 6)}
    assert all(set(files(anagram.folder)) == set(NAMES) for anagram in made)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_or_damaged_file_is_made_again(make, name):
    folder = make()[0].folder
    before = files(folder)
    (folder / name).unlink()
    assert not make()[0].skipped
    assert files(folder) == before
    if name in PICTURES:
        (folder / name).write_bytes(before[name][:-1] + b"?")
        assert not make()[0].skipped
        assert files(folder) == before


def test_overwrite_leaves_nothing_of_the_other_request_but_a_users_own_files(make):
    folder = make()[0].folder
    (folder / "sample_8.mine.png").write_bytes(b"mine")
    other = {"prompts": ["a cat", "a house"], "stop_after": 8}
    made = make(**other, overwrite=True)[0]
    assert not made.skipped
    assert (folder / "sample_8.mine.png").read_bytes() == b"mine"
    (folder / "sample_8.mine.png").unlink()
    assert files(made.folder) == files(make("b", **other)[0].folder)
    assert not make(**other, overwrite=True)[0].skipped


def stop(*at):
    """An on_step that interrupts one seed at one step of one stage: stop(seed, stage, index)."""

    def on_step(seeds, stage, state):
        if at == (seeds[0], stage, state.index):
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("stage, index", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_an_interrupted_run_goes_on(make, tmp_path, stage, index):
    with pytest.raises(KeyboardInterrupt):
        make(seed=[1, 2, 3], batch_size=1, on_step=stop(2, stage, index))
    left = files(tmp_path / "out")
    of_two = {f"0002/{name}" for name in PICTURES[:2]} if stage == 2 else set()
    assert set(left) == {f"0001/{name}" for name in NAMES} | of_two
    made = make(seed=[1, 2, 3], batch_size=1)
    assert [anagram.skipped for anagram in made] == [True, False, False]
    make("undisturbed", seed=[1, 2, 3], batch_size=1)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert left.items() < files(tmp_path / "undisturbed").items()


@pytest.mark.parametrize("stage, old_is_whole", [(1, True), (2, False)])
def test_an_interrupted_overwrite_leaves_no_false_metadata(make, stage, old_is_whole):
    """Until the first new picture is written the old ones stay; then they must not pass for whole."""
    folder = make()[0].folder
    before = files(folder)
    with pytest.raises(KeyboardInterrupt):
        make(style="", overwrite=True, on_step=stop(9, stage, 1))
    assert (files(folder) == before) == old_is_whole
    assert (folder / "metadata.json").exists() == old_is_whole
    if not old_is_whole:
        assert not make(style="")[0].skipped  # no overwrite needed: there is nothing finished to lose
        assert files(folder) == files(make("b", style="")[0].folder)


def test_leftovers_of_a_killed_process_are_removed(make, tmp_path):
    folder = tmp_path / "out" / "0009"
    folder.mkdir(parents=True)
    (folder / ".sample_8.png.k1ll3d.part").write_bytes(b"half")
    (folder / ".metadata.json.k1ll3d.part").write_bytes(b"{")
    make()
    assert set(files(folder)) == set(NAMES)
    (folder / ".sample_8.png.k1ll3d.part").write_bytes(b"half")  # killed while it made a damaged one again
    assert make()[0].skipped
    assert set(files(folder)) == set(NAMES)
