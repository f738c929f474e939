"""What was made, shown: films, the page in a real browser, sheets, previews, and what the command lists."""

import base64
import http.server
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from PIL import Image

from mtl_anagram import InputError, Preview, Recipe, generate_anagram
from mtl_anagram.__main__ import main
from mtl_anagram.evaluation.gallery import RATE, animate, encode_animation, find_made, write_page
from mtl_anagram.files import outputs
from mtl_anagram.files.images import encode_png, read_picture, to_uint8
from mtl_anagram.views import VIEW_NAMES, get_views
from tests.unit.test_motion import picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPTS = ["a duck", "a </script> rabbit", "a hat"]


def write(folder, seed, names, sizes=(64,), shape=(64, 64)):
    """A finished seed's folder, as generate_anagram writes it."""
    views = get_views(names)
    for size in sizes:
        grown = [side * (size if isinstance(size, int) else shape[0]) // shape[0] for side in shape]
        outputs.write_pictures(outputs.folder_of(folder, seed), size, picture(*grown), views)
    request = {"style": "", "recipe": Recipe.plain().to_dict(), "views": [v.to_metadata() for v in views]}
    request["prompts"] = [PROMPTS[i % 3] for i in range(len(names))]
    return outputs.finish(folder, seed, request, sizes, {}, ()).folder


def test_films_of_all_seeds(tmp_path):
    """Each view is held, in turn, and the last goes over into the first; the picture that is held is the view's."""
    write(tmp_path, 3, ["identity", "rotate_cw", "negate"])
    write(tmp_path, 4, ["flip", "identity"], sizes=(64, 128, 512))
    made = dict(animate(tmp_path, seconds=0.2))
    kinds = ["gif", "webp", *["mp4"] * (shutil.which("ffmpeg") is not None)]
    names = [f"0003/sample_64.{kind}" for kind in kinds] + [f"0004/sample_128.{kind}" for kind in kinds]
    assert [path.relative_to(tmp_path).as_posix() for path in made] == names
    assert not any(made.values())
    three, four = find_made([tmp_path])
    ways, room = three.ways()
    assert (room, [len(way.motions) for way in ways]) == (13, [0, 1, 1])
    for kind in ("gif", "webp"):
        film = Image.open(three.file.with_suffix(f".{kind}"))
        assert (film.n_frames, film.info["loop"]) == (3 * 4, 0)
        for i, way in enumerate(ways):
            film.seek(4 * i)
            film.load()
            assert film.info["duration"] == 1000
            held = torch.tensor(list(film.convert("RGB").tobytes())).view(film.height, film.width, 3)
            held = held[4 * room : 4 * room + 256 : 4, 4 * room : 4 * room + 256 : 4].permute(2, 0, 1)
            assert (held - to_uint8(way.at(1)).int()).abs().float().mean() < (10 if kind == "gif" else 4)
    if "mp4" in kinds:
        assert four.file.with_suffix(".mp4").read_bytes()[4:8] == b"ftyp"
    assert all(there for path, there in animate(tmp_path, seconds=0.2) if path.suffix != ".mp4")
    with pytest.raises(InputError, match="gif is there.*overwrite=True"):
        list(animate(tmp_path / "0003", seconds=0.4))
    assert not dict(animate(tmp_path / "0003", seconds=0.4, overwrite=True))[three.file.with_suffix(".gif")]
    outputs.clear(three.file.parent)
    assert not list(three.file.parent.iterdir())


def test_one_view_is_one_frame_and_no_ffmpeg_is_no_film(tmp_path, monkeypatch):
    folder = write(tmp_path, 0, ["rotate_cw"], sizes=((32, 32),), shape=(32, 32))
    monkeypatch.setenv("PATH", str(tmp_path))
    (gif, _), (webp, _) = animate(folder)
    assert (gif.name, webp.suffix, Image.open(gif).n_frames) == ("sample_32x32.gif", ".webp", 1)
    assert encode_animation([picture()], [RATE], "mp4") is None


def test_what_cannot_be_shown(tmp_path):
    with pytest.raises(InputError, match="no metadata.json"):
        find_made([tmp_path / "none"])
    folder = write(tmp_path, 0, ["identity", "flip"])
    with pytest.raises(InputError, match="size="):
        find_made([folder], 0)
    (folder / "sample_64.png").unlink()
    with pytest.raises(InputError, match="cannot be shown"):
        write_page([folder], tmp_path / "page.html")


def test_the_order_is_that_of_the_scores(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path / "out/candidates", seed, ["identity", "flip"], sizes=(32,), shape=(32, 32))
    write(tmp_path / "out", 2, ["identity", "flip"])
    write(tmp_path / "other", 0, ["identity"])
    (tmp_path / "out/candidates/scores.json").write_text(json.dumps({"1": 0.2, "2": 0.3, "3": -1.5}))
    found = find_made([tmp_path])
    assert [made.content["seed"] for made in found] == [2, 1, 3, 0]
    assert [made.score for made in found] == [0.3, 0.2, -1.5, None]
    assert found[0].file == tmp_path / "out/0002/sample_64.png"


# In the page a click, a key and a drag turn a picture; what its canvas shows then is handed out.
DRIVER = """<script>(async () => {
  const wait = async done => { while (!done()) await new Promise(then => setTimeout(then, 20)); };
  await wait(() => "ready" in document.body.dataset);
  const found = [];
  for (const button of document.querySelectorAll("button")) {
    const canvas = button.querySelector("canvas"), images = [], labels = [];
    const count = button.parentElement.querySelectorAll("details p").length;
    const turned = async view => {
      await wait(() => button.dataset.view === String(view));
      images.push(canvas.toDataURL());
      labels.push(button.getAttribute("aria-label"));
    };
    await turned(0);
    for (let view = 1; view < count; view++) { button.click(); await turned(view); }
    const point = (name, x, buttons) => button.dispatchEvent(new PointerEvent(name,
      {pointerId: 1, clientX: x, buttons, bubbles: true}));
    button.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
    await turned(0);
    point("pointerdown", 0, 1);
    point("pointermove", button.clientWidth / 3, 1);
    const half = canvas.toDataURL();
    point("pointermove", button.clientWidth / 2, 1);
    point("pointerup", button.clientWidth / 2, 0);
    await turned(1);
    button.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
    await turned(0);
    found.push({images, labels, half, hidden: !button.parentElement.querySelector("details").open});
  }
  fetch("SERVER", {method: "POST", mode: "no-cors", body: JSON.stringify(found)});
})();</script>"""


class Answer(http.server.BaseHTTPRequestHandler):
    """Keeps what a page sends."""

    def do_POST(self):
        self.server.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def browse(page, profile, *flags):
    """What the driver, at the page's end, finds in a headless Chromium and sends to a server here."""
    words = f"{CHROMIUM} --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    words += f"--disable-background-networking --disable-component-update --user-data-dir={profile}"
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.timeout, server.answer = 60, None
        driver = DRIVER.replace("SERVER", f"http://127.0.0.1:{server.server_port}")
        page.write_text(page.read_text().replace("SECONDS = 1.2", "SECONDS = 0.1") + driver)
        command = [*words.split(), *flags, page.as_uri()]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            server.handle_request()
            process.terminate()
    assert server.answer, "the page did not turn all its pictures"
    return server.answer


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("flags", [[], ["--force-prefers-reduced-motion"]])
def test_the_page_in_a_browser(tmp_path, flags):
    names = ("flip", "jigsaw", "pixel_permute", "inner_circle", "rotate_cw+negate")
    others = [name for name in VIEW_NAMES if name not in (*names, "permutation")]
    rows = [*(["identity", name] for name in names), ["rotate_ccw", *others]]
    for seed, row in enumerate(rows[::5] if flags else rows):
        write(tmp_path / "out", seed, row)
    page = tmp_path / "page.html"
    assert write_page([tmp_path / "out"], page) == len(list((tmp_path / "out").iterdir()))
    assert not re.findall(r"https?://|<link|src=|import\(", page.read_text())
    cards = browse(page, tmp_path / "profile", *flags)
    for card, made in zip(cards, find_made([tmp_path / "out"]), strict=True):
        ways, room = made.ways()

        def decoded(url):
            (tmp_path / "canvas.png").write_bytes(base64.b64decode(url.partition(",")[2]))
            return read_picture(tmp_path / "canvas.png")

        shown = [decoded(url) for url in card["images"]]
        for canvas, i in zip(shown, [*range(len(ways)), 0, 1, 0], strict=True):
            expected = to_uint8(ways[i].at(1)) / 127.5 - 1
            assert torch.equal(canvas[:, room:-room, room:-room], expected)
        moving = [way for way in ways[:2] if way.motions]
        if len(moving) == 1:
            assert (decoded(card["half"]) - moving[0].at(0.5, room)).abs().mean() < 0.08
        names = [view["name"] for view in made.content["request"]["views"]]
        assert all(names[i] in card["labels"][i] for i in range(len(ways)))
        assert card["hidden"]
        assert not any(prompt in label for prompt in PROMPTS for label in card["labels"])


def test_a_preview_in_a_file_and_in_a_notebook(cascade, tmp_path, monkeypatch):
    notebook = Mock()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    preview, steps = Preview(tmp_path / "now.png"), []

    def on_step(seeds, stage, state):
        preview(seeds, stage, state)
        row = torch.cat(list(state.x0), dim=-1)
        assert (tmp_path / "now.png").read_bytes() == encode_png(row)
        steps.append(row.shape)

    recipe = Recipe.plain(num_inference_steps=2)
    readings = (["a duck", "a rabbit"], ["identity", "flip"])
    request = {"model": cascade, "recipe": recipe, "seed": [5, 7], "size": 8}
    made = generate_anagram("a sketch of", *readings, tmp_path / "out", on_step=on_step, **request)
    assert steps == [(3, 8, 16)] * 2 + [(3, 32, 64)] * 2
    image, new = notebook.display.Image.return_value, notebook.display.display
    new.assert_called_once_with(image, display_id=True)
    assert new.return_value.update.mock_calls == [call(image)] * 3
    sheet = read_picture(tmp_path / "out/seeds.png")
    for one in made:  # each seed's strip lies on the sheet
        strip = read_picture(one.folder / "sample_8.views.png")
        windows = sheet.unfold(1, strip.shape[1], 1).unfold(2, strip.shape[2], 1)
        assert (windows == strip[:, None, None]).all(0).flatten(2).all(-1).any()


def test_the_commands(own_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("out"), 6, ["identity", "rotate_180"])
    assert main(["animate", "out", "--seconds", "0.1"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["out/0006/sample_64.gif", "out/0006/sample_64.webp"]
    assert main(["page", "out/0006", "out", "--out", "all.html"]) == 0
    assert "1 anagrams" in capsys.readouterr().out
    write(Path("out"), 7, ["identity", "flip"])
    assert main(["page", "out", "--out", "all.html"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["page", "out", "--out", "all.html", "--overwrite"]) == 0
    assert main(["views", "--sheet", "views.png"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert [re.match(r"\w+", line)[0] for line in lines] == list(VIEW_NAMES)
    jigsaw = next(line for line in lines if line.startswith("jigsaw"))
    assert all(words in jigsaw for words in ("num_pieces: int = 4", "a multiple of 4", "square"))
    assert Image.open("views.png").width > 500
    about = {"name": "own", "concepts": ["duck", "cat"], "styles": ["ink"]}
    (own_folder / "cascade.json").write_text(json.dumps(about))
    assert main(["concepts", "--model", "own"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["concepts: duck, cat", "styles: ink"]
    words = ["--model", "own", "--device", "cpu", "--size", "8", "--steps", "1", "--no-balancing", "--quiet"]
    readings = ["generate", "a duck", "a cat", "--views", "identity", "flip", "--preview", "now.png"]
    assert main([*readings, *words, "--no-anti-segregation", "--out", "new"]) == 0
    assert Image.open("now.png").size == (32, 32)
