"""The examples that train on images: that they train, what their loaders read, and what they refuse."""

import contextlib
import gzip
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_examples import run

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "image_folder.py"
CLASSIFICATION = EXAMPLES / "image_classification.py"
RED, BLUE = (200, 0, 0), (0, 0, 200)


def load_example(script):
    """What a script defines."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(EXAMPLES)
        return runpy.run_path(str(script), run_name="example")


@pytest.fixture(scope="module")
def image_folder():
    return load_example(FOLDER)


@pytest.fixture(scope="module")
def image_classification():
    return load_example(CLASSIFICATION)


def refused(monkeypatch, capsys, script, *arguments):
    """What is printed where a script refuses to start: nothing but errors."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, *arguments)
    return capsys.readouterr().err


def save(path, color, count=5):
    """Makes a folder with images of one color, of any size."""
    path.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (20 + number, 30), color).save(path / f"{number}.png")
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes of images."""
    save(tmp_path / "photos" / "red", RED)
    save(tmp_path / "photos" / "blue", BLUE)
    return tmp_path / "photos"


def rows_of(printed):
    return re.findall(r"│ (\w+ (?:alone|with GC)) +│ +([\d.]+) │ +([\d.]+) (?:│ +([\d.]+) )?│", printed)


# Folders of images


@pytest.mark.thorough
def test_folders_of_images_are_told_apart(photos, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    sizes = ["--size", 8, "--epochs", 2, "--batch-size", 2, "--seeds", 1]
    run(monkeypatch, FOLDER, "--data", photos, *sizes, "--output", picture)
    printed = capsys.readouterr().out
    assert "8 images to train on, 2 to validate with: blue, red" in printed
    assert "5 of 10 parameters are centralized" in printed
    rows = rows_of(printed)
    assert [row[0] for row in rows] == ["RMSprop alone", "RMSprop with GC"]
    for _, seconds, accuracy, loss in rows:
        assert float(seconds) > 0
        assert float(accuracy) in (0, 50, 100)
        assert 0 < float(loss) < 5
    assert rows[0][3] != rows[1][3], "two different ways to train"
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.size[0] > 1000


@pytest.mark.thorough
def test_without_a_folder_it_draws_one_and_removes_it(image_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(image_folder["get_data"].__globals__, "DRAWN", 10)
    arguments = image_folder["argparse"].Namespace(size=16)
    data = image_folder["get_data"](arguments, Console(quiet=True))
    assert data.classes == ["squares", "triangles"]
    assert data.train.pixels.shape == (16, 16, 16, 3)
    assert np.bincount(data.validation.labels).tolist() == [2, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_split_with_as_much_of_each_class(image_folder, photos):
    save(photos / "green", (0, 200, 0), count=20)
    data = image_folder["load"](photos, 8, Console(quiet=True))
    assert data.classes == ["blue", "green", "red"]
    assert np.bincount(data.train.labels).tolist() == [4, 16, 4]
    assert np.bincount(data.validation.labels).tolist() == [1, 4, 1]
    colors = np.array([BLUE, (0, 200, 0), RED])
    for images in (data.train, data.validation):
        assert (images.pixels == colors[images.labels][:, None, None]).all(), "each has its own label"


def test_a_split_folder_is_taken_as_it_is(image_folder, tmp_path, capsys):
    for part, count in (("train", 3), ("validation", 1), ("test", 1)):
        save(tmp_path / part / "red", RED, count)
        save(tmp_path / part / "blue", BLUE, count)
    data = image_folder["load"](tmp_path, 8, Console(width=200))
    assert (len(data.train.labels), len(data.validation.labels)) == (6, 2)
    assert "skipped 1 that are no PNG or JPEG: test" in capsys.readouterr().out


def test_what_is_hidden_is_ignored_and_what_is_no_image_reported(image_folder, photos, capsys):
    save(photos / ".ipynb_checkpoints", RED)
    for name in (".DS_Store", "notes.txt", "red/.DS_Store", "red/list.csv", "blue/moving.gif"):
        (photos / name).write_bytes(b"something")
    (photos / "blue" / "folder.png").mkdir()
    data = image_folder["load"](photos, 8, Console(width=200))
    assert data.classes == ["blue", "red"]
    reported = (
        "skipped 4 that are no PNG or JPEG: blue/folder.png, blue/moving.gif, notes.txt, red/list.csv\n"
    )
    assert capsys.readouterr().out.startswith(reported)


@pytest.mark.parametrize(
    ("mode", "color", "seen"),
    [
        ("RGB", (10, 100, 200), (10, 100, 200)),
        ("RGBA", (10, 100, 200, 255), (10, 100, 200)),
        ("RGBA", (10, 100, 200, 0), (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 100 * 257, (100, 100, 100)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_images_of_all_modes_become_what_one_sees(mode, color, seen, image_folder, tmp_path):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new(mode, (40, 20), color).save(path)
    pixels = image_folder["read_image"](path, 16)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (16, 16, 3))
    np.testing.assert_allclose(pixels, np.broadcast_to(seen, pixels.shape), atol=3)


@pytest.mark.parametrize("transparency", [None, 0])
def test_a_palette_is_looked_up(transparency, image_folder, tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 100, 200])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "image.png", **options)
    seen = (10, 100, 200) if transparency is None else (255, 255, 255)
    assert (image_folder["read_image"](tmp_path / "image.png", 8) == seen).all()


def test_an_image_that_the_camera_has_turned_is_turned_back(image_folder, tmp_path):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.jpg", exif=exif)
    seen = image_folder["read_image"](tmp_path / "turned.jpg", 16)
    np.testing.assert_allclose(seen, upright, atol=10)


def test_a_jpeg_with_the_ending_of_a_png_is_read(image_folder, tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "image.PNG", format="JPEG")
    assert (image_folder["read_image"](tmp_path / "image.PNG", 8) == 255).all()


def break_image(path):
    path.write_bytes(path.read_bytes()[:-30])
    return str(path)


def rename_webp(path):
    Image.new("RGB", (8, 8)).save(path, format="WEBP")
    return str(path)


@pytest.mark.parametrize("damage", [break_image, rename_webp, lambda path: path.write_text("no image")])
def test_a_broken_image_is_named_before_the_training(damage, photos, monkeypatch, capsys):
    path = photos / "red" / "3.png"
    damage(path)
    error = refused(monkeypatch, capsys, FOLDER, "--data", photos, "--size", 8)
    assert error.startswith(
        f"image_folder.py: error: argument --data: {path} is no PNG or JPEG image that can"
    )
    assert error.count("\n") == 1


def test_damage_anywhere_in_an_image_is_read_or_named(image_folder, tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("image.png", "image.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] = random.integers(256)
            (tmp_path / name).write_bytes(damaged)
            with contextlib.suppress(image_folder["DataError"]):
                assert image_folder["read_image"](tmp_path / name, 8).shape == (8, 8, 3)


def make_nothing(photos):
    for path in photos.rglob("*.png"):
        path.unlink()
    return f"{photos} has no folders with PNG or JPEG images in them"


def make_flat(photos):
    make_nothing(photos)
    for name in ("red", "blue"):
        (photos / name).rmdir()
    Image.new("RGB", (8, 8)).save(photos / "image.png")
    return f"{photos} has no folders with PNG or JPEG images in them"


def make_empty_class(photos):
    (photos / "green").mkdir()
    (photos / "green" / "notes.txt").write_text("none")
    return f"{photos / 'green'} has no PNG or JPEG images in it"


def make_one_class(photos):
    (photos / "red").rename(photos / ".red")
    return f"{photos} has only one class, blue"


def make_small_class(photos):
    (photos / "red" / "0.png").unlink()
    return f"{photos / 'red'} has only 4 images"


def make_other_classes(photos):
    save(photos / "train" / "red", RED)
    save(photos / "train" / "blue", BLUE)
    save(photos / "validation" / "red", RED)
    save(photos / "validation" / "black", (0, 0, 0))
    return f"{photos / 'train'} has no class black"


@pytest.mark.parametrize(
    "make", [make_nothing, make_flat, make_empty_class, make_one_class, make_small_class, make_other_classes]
)
def test_a_folder_that_cannot_be_trained_on_is_refused(make, photos, monkeypatch, capsys):
    message = make(photos)
    error = refused(monkeypatch, capsys, FOLDER, "--data", photos)
    assert error.startswith(f"image_folder.py: error: argument --data: {message}")
    assert error.count("\n") == 1


def test_augmentation_is_repeatable_and_keeps_what_it_can(image_folder):
    augment = jax.jit(jax.vmap(image_folder["augment"]))
    keys = jax.random.split(jax.random.key(0), 20)
    plain = np.full((20, 8, 8, 3), 77, np.float32)
    np.testing.assert_allclose(augment(keys, plain), plain, rtol=1e-6, err_msg="edges are drawn out")
    images = np.random.default_rng(0).uniform(0, 255, (1, 8, 8, 3)).astype(np.float32).repeat(20, 0)
    changed = np.asarray(augment(keys, images))
    np.testing.assert_array_equal(changed, augment(keys, images))
    assert len(np.unique(changed.reshape(20, -1), axis=0)) == 20, "another change for each key"
    assert changed.min() >= 0
    assert changed.max() <= 255


def test_augmentation_without_ranges_flips_every_other_image(image_folder, monkeypatch):
    for name in ("ROTATION", "SHIFT", "SHEAR", "ZOOM"):
        monkeypatch.setitem(image_folder["augment"].__globals__, name, 0.0)
    image = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 100)
    changed = jax.jit(jax.vmap(image_folder["augment"], (0, None)))(keys, image)
    kept = np.isclose(changed, image, atol=1e-3).all((1, 2, 3))
    flipped = np.isclose(changed, image[:, ::-1], atol=1e-3).all((1, 2, 3))
    assert (kept ^ flipped).all()
    assert 30 < flipped.sum() < 70


# Fashion-MNIST


def write_idx(path, array, *, kind=8, sizes=None):
    sizes = array.shape if sizes is None else sizes
    header = bytes([0, 0, kind, len(sizes)]) + np.array(sizes, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """A folder with files as those of Fashion-MNIST, of few images: those of a class are of one shade."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_digits_are_told_apart(optimizer, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    sizes = ["--epochs", 2, "--seeds", 1, "--subset", 640]
    run(monkeypatch, CLASSIFICATION, "--optimizer", optimizer, *sizes, "--output", picture)
    printed = capsys.readouterr().out
    assert "640 images of digits to train on, 360 to test with" in printed
    assert "4 of 10 parameters are centralized" in printed
    rows = rows_of(printed)
    assert [row[0] for row in rows] == [f"{optimizer} alone", f"{optimizer} with GC"]
    for _, accuracy, loss, _ in rows:
        assert 15 < float(accuracy) <= 100
        assert 0 < float(loss) < 2.3, "better than ten equal guesses"
    assert rows[0][2] != rows[1][2], "two different ways to train"
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


def test_fashion_mnist_is_read_from_its_files(fashion, image_classification):
    data = image_classification["load_fashion_mnist"](fashion)
    assert (data.name, data.mirrored) == ("Fashion-MNIST", True)
    assert data.train.pixels.shape == (40, 28, 28, 1)
    assert data.test.pixels.shape == (20, 28, 28, 1)
    assert data.train.pixels.dtype == np.float32
    for images in (data.train, data.test):
        assert images.labels.tolist() == [*range(10)] * (len(images.labels) // 10)
        shades = images.pixels.mean((1, 2, 3)) * 255
        np.testing.assert_allclose(shades, images.labels * 20.0, rtol=1e-5)


def lack(path):
    path.unlink()
    return "cannot be read: No such file or directory"


def unpack(path):
    path.write_bytes(gzip.decompress(path.read_bytes()))
    return "cannot be read: Not a gzipped file"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])
    return "cannot be read: Compressed file ended before"


def flip_bits(path):
    damaged = bytearray(path.read_bytes())
    damaged[12] ^= 0xFF
    path.write_bytes(damaged)
    return "cannot be read: "


def replace_magic(path):
    path.write_bytes(gzip.compress(b"PK\x03\x04 and more"))
    return "is no IDX file: it starts with 50 4b 03 04"


def make_empty(path):
    path.write_bytes(gzip.compress(b""))
    return "is no IDX file: it starts with nothing"


def write_floats(path):
    write_idx(path, np.zeros((40, 28, 28), ">f4"), kind=13)
    return "holds numbers of type 0x0d, not bytes, 0x08"


def swap_for_labels(path):
    path.write_bytes((path.parent / "train-labels-idx1-ubyte.gz").read_bytes())
    return "has 1 dimensions, not 3"


def write_too_few(path):
    write_idx(path, np.zeros((39, 28, 28), np.uint8), sizes=(40, 28, 28))
    return "has 30576 bytes of data, not 40 x 28 x 28"


def write_enormous_sizes(path):
    write_idx(path, np.zeros(0, np.uint8), sizes=(2**32 - 1,) * 3)
    return "has 0 bytes of data, not 4294967295 x 4294967295 x 4294967295"


@pytest.mark.parametrize(
    "damage",
    [
        lack,
        unpack,
        truncate,
        flip_bits,
        replace_magic,
        make_empty,
        write_floats,
        swap_for_labels,
        write_too_few,
        write_enormous_sizes,
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(damage, fashion, image_classification):
    path = fashion / "train-images-idx3-ubyte.gz"
    message = damage(path)
    with pytest.raises(image_classification["DataError"]) as caught:
        image_classification["load_fashion_mnist"](fashion)
    assert str(caught.value).startswith(f"{path} {message}")


def test_labels_must_go_with_the_images(fashion, image_classification):
    path = fashion / "t10k-labels-idx1-ubyte.gz"
    for labels, message in (
        (np.zeros(19, np.uint8), "has 19 labels for 20 images"),
        (np.full(20, 10, np.uint8), "has the label 10, the last one is 9"),
    ):
        write_idx(path, labels)
        with pytest.raises(image_classification["DataError"]) as caught:
            image_classification["load_fashion_mnist"](fashion)
        assert str(caught.value) == f"{path} {message}"


def test_a_missing_file_ends_the_script_in_one_line(fashion, monkeypatch, capsys):
    path = fashion / "t10k-images-idx3-ubyte.gz"
    lack(path)
    error = refused(monkeypatch, capsys, CLASSIFICATION, "--data-dir", fashion)
    message = f"argument --data-dir: {path} cannot be read: No such file or directory"
    assert error == f"image_classification.py: error: {message}\n"


def test_images_are_shifted_and_mirrored_where_that_is_allowed(image_classification):
    keys = jax.random.split(jax.random.key(0), 200)
    image = np.zeros((8, 8, 1), np.float32)
    image[3, 2] = 1
    augment = jax.jit(jax.vmap(image_classification["augment"], (0, None, None)))
    for mirrored, columns in ((False, {1, 2, 3}), (True, {1, 2, 3, 4, 5, 6})):
        changed = np.asarray(augment(keys, image, mirrored))
        _, rows, found, _ = changed.nonzero()
        assert changed.sum() == 200
        assert set(rows.tolist()) == {2, 3, 4}
        assert set(found.tolist()) == columns


# Arguments


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        (FOLDER, "--data", "no/such/folder", "there is no folder"),
        (FOLDER, "--size", "7", "must be at least 8, got 7"),
        (FOLDER, "--epochs", "0", "must be at least 1, got 0"),
        (FOLDER, "--learning-rate", "-1", "must be a positive number, got -1"),
        (CLASSIFICATION, "--data-dir", "no/such/folder", "there is no folder"),
        (CLASSIFICATION, "--subset", "1438", "there are only 1437 training images"),
        (CLASSIFICATION, "--batch-size", "1438", "there are only 1437 training images"),
        (CLASSIFICATION, "--optimizer", "adam", "invalid choice: 'adam'"),
        (CLASSIFICATION, "--output", "curves.txt", "curves.txt must end in one of"),
    ],
)
def test_bad_arguments_are_refused(script, option, value, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert f"argument {option}: {message}" in refused(monkeypatch, capsys, script, option, value)


def test_a_batch_of_more_than_all_images_is_refused(photos, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, FOLDER, "--data", photos, "--size", 8, "--batch-size", 9)
    assert "argument --batch-size: there are only 8 training images" in error
