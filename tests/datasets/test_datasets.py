"""The digits are the published ones, files load as NumPy, scikit-learn and a reader's eye say, and bad files are
refused in one line, fast, however they are damaged."""

import csv
import gzip
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from anyarray_linear.datasets import (
    Data,
    DataError,
    _csv,
    _text,
    load_data,
    load_digits,
    load_features,
    make_digits,
    read_data,
    split,
)


def write(folder, text, name="data.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def savez(folder, **arrays):
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def message(call, *args, **options):
    """The one line with which a call refuses."""
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert line.isprintable()
    return line


# --- the digits


def test_digits_are_those_of_scikit_learn():
    data, target = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    X, y = load_digits()
    assert (X.dtype, y.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(X * 16, data)
    np.testing.assert_array_equal(y, target)


def test_digits_have_the_published_count_of_each_class():
    # The table of class counts on the data set's page at UCI, test set.
    X, y = load_digits()
    assert X.shape == (1797, 64)
    assert (X.min(), X.max()) == (0, 1)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_are_a_fresh_copy_each_time():
    X, _ = load_digits()
    X[:] = 7
    assert load_digits()[0].max() == 1


def test_the_script_writes_the_shipped_digits_with_their_credit(tmp_path):
    pytest.importorskip("sklearn")
    make_digits.make(tmp_path / "1.npz")
    make_digits.make(tmp_path / "2.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    shipped = Path(make_digits.__file__).with_name("digits.npz")
    # Archives are compared by member: another zlib may pack the same bytes in another way.
    with zipfile.ZipFile(tmp_path / "1.npz") as made, zipfile.ZipFile(shipped) as kept:
        assert made.namelist() == kept.namelist()
        assert all(made.read(name) == kept.read(name) for name in kept.namelist())
    with np.load(shipped) as data:
        assert "Alpaydin and C. Kaynak" in str(data["about"])
        assert "CC BY 4.0" in str(data["about"])
    assert shipped.stat().st_size < 50_000


def test_the_shipped_file_loads_like_any_other():
    data = load_data(Path(make_digits.__file__).with_name("digits.npz"))
    X, y = load_digits()
    np.testing.assert_array_equal(data.X, X * 16)
    np.testing.assert_array_equal(data.y, y)
    assert data.classes == tuple("0123456789")


def test_import_loads_neither_scikit_learn_nor_pandas_nor_random():
    code = (
        "import sys, numpy, anyarray_linear; before = set(sys.modules); import anyarray_linear.datasets;"
        "new = set(sys.modules) - before;"
        "print(sorted({m.partition('.')[0] for m in new} & {'sklearn', 'pandas', 'scipy', 'torch', 'cupy'}"
        " | ({'numpy.random'} & new)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- splitting


def test_split_parts_are_disjoint_complete_and_keep_rows_with_their_targets():
    X, y = np.arange(300).reshape(100, 3), np.arange(100) % 7
    X_train, y_train, X_test, y_test = split(X, y, test=0.3, seed=5)
    rows = np.concatenate([X_train, X_test])[:, 0] // 3
    assert sorted(rows) == list(range(100))
    np.testing.assert_array_equal(np.concatenate([y_train, y_test]), rows % 7)
    assert len(X_test) == 30


@pytest.mark.parametrize("test", [0.1, 0.2, 0.25, 0.5, 0.77])
def test_split_gives_each_class_its_share_to_one_sample(test):
    y = np.random.default_rng(0).choice(6, size=503, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    _, _, _, y_test = split(y[:, None], y, test=test)
    assert np.abs(np.bincount(y_test, minlength=6) - test * np.bincount(y)).max() <= 1
    assert abs(len(y_test) - test * 503) <= 0.5


def test_split_shuffles_even_sorted_classes_and_depends_on_the_seed_alone():
    y = np.repeat(np.arange(5), 40)
    first, again, other = (split(y[:, None], y, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])
    assert all(len(set(part[:20].tolist())) > 2 for part in (first[1], first[3]))


def test_split_takes_regression_targets_of_any_width():
    y = np.random.default_rng(0).normal(size=(50, 2))
    _, y_train, _, y_test = split(y, y)
    assert (y_train.shape, y_test.shape) == ((40, 2), (10, 2))


@pytest.mark.parametrize("test", [0, 1, -0.5, float("nan")])
def test_split_refuses_what_is_no_fraction(test):
    with pytest.raises(ValueError, match="must be a fraction"):
        split(np.ones((9, 1)), np.ones(9), test=test)


def test_split_refuses_too_few_samples_and_different_lengths():
    with pytest.raises(DataError, match="of 2 samples leaves one part empty"):
        split(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ValueError, match="y has 3 samples but X has 2"):
        split(np.ones((2, 1)), np.ones(3))


# --- good files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [("uint8", "float32"), ("int16", "float32"), ("float16", "float32"), (">f4", "float32"), ("bool", "float32"),
     ("int32", "float64"), ("float64", "float64"), ("longdouble", "float64")],
)  # fmt: skip
def test_npz_features_become_the_smallest_float_that_holds_them(tmp_path, save, stored, loaded):
    X = np.asfortranarray(np.arange(12).reshape(4, 3) % 5).astype(stored)
    save(tmp_path / "data.npz", X=X, y=np.array([0, 1, 1, 0]))
    data = load_data(tmp_path / "data.npz")
    assert data.X.dtype == np.dtype(loaded)
    assert data.X.dtype.isnative
    np.testing.assert_array_equal(data.X, X)
    np.testing.assert_array_equal(load_features(tmp_path / "data.npz", 3), X)


# The rule: what is a class, and what it is called. `ids`: where they are not the numbers themselves.
TARGETS = {
    "ids": (np.array([0, 2, 2, 1, 0, 1], "uint8"), ("0", "1", "2"), None),
    "labels from 1": (np.array([1, 2, 3] * 2), ("1", "2", "3"), [0, 1, 2] * 2),
    "hundreds": (np.array([100, 300, 200] * 2), ("100", "200", "300"), [0, 2, 1] * 2),
    "a gap": (np.array([0, 2, 2, 0]), ("0", "2"), [0, 1, 1, 0]),
    "one column": (np.array([[1], [0], [1], [0]]), ("0", "1"), [1, 0, 1, 0]),
    "truth values": (np.array([True, False, True, True]), ("False", "True"), [1, 0, 1, 1]),
    "floats that are whole": (np.array([0.0, 2.0, 2.0, 0.0]), ("0", "2"), [0, 1, 1, 0]),
    "negative": (np.array([-1.0, 1.0, 1.0, -1.0]), ("-1", "1"), [0, 1, 1, 0]),
    "years": (np.repeat([2019, 2021, 2020], 3), ("2019", "2020", "2021"), [0] * 3 + [2] * 3 + [1] * 3),
    "far apart": (np.array([-(10**12), 2**62] * 2), ("-1000000000000", "4611686018427387904"), [0, 1] * 2),
    "twenty": (np.repeat(np.arange(20) * 3, 2), tuple(str(3 * i) for i in range(20)), np.repeat(np.arange(20), 2)),
    "one more": (np.repeat(np.arange(21) * 3, 2), None, None),
    "each once": (np.arange(4), None, None),
    "ids of many classes": (np.repeat(np.arange(40), 10), tuple(map(str, range(40))), None),
    "many from 1": (np.repeat(np.arange(40), 10) + 1, tuple(str(i + 1) for i in range(40)), np.repeat(np.arange(40), 10)),
    "many from 1, rare": (np.repeat(np.arange(40), 4) + 1, None, None),
    "many with a gap": (np.repeat(np.delete(np.arange(40), 7), 10), None, None),
    "halves": (np.array([0.5, 2.0, 2.0, 0.0], "float32"), None, None),
    "rows": (np.array([[0.5, 2.0], [2.0, 0.0], [1, 1], [1, 1]]), None, None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_classes_are_what_occurs_and_many_different_numbers_are_none(tmp_path, name):
    y, classes, ids = TARGETS[name]
    data = load_data(savez(tmp_path, X=np.ones((len(y), 2)), y=y))
    assert data.classes == classes
    assert data.y.dtype == (np.int64 if classes else np.result_type(y.dtype, np.float32))
    np.testing.assert_array_equal(data.y, y if ids is None else ids)


def test_integers_to_predict_are_no_classes(tmp_path):
    _, y = pytest.importorskip("sklearn.datasets").load_diabetes(return_X_y=True)  # whole, 25 to 346
    path = savez(tmp_path, X=np.ones((len(y), 2)), y=y.astype(int))
    assert load_data(path).classes is None
    assert "different whole numbers in 442 samples: a number to predict" in read_data(path).told
    assert read_data(path).instead == "classification"
    assert load_data(path, task="classification").classes == tuple(str(int(v)) for v in np.unique(y))


def test_task_overrides_what_the_numbers_look_like(tmp_path):
    path = savez(tmp_path, X=np.ones((3, 2)), y=np.array([3, 1, 2]), z=np.array([1.5, 0.5, 1.5]))
    assert load_data(path, task="regression").y.dtype == np.float64
    data = load_data(path, target="z", task="classification")
    assert (data.y.tolist(), data.classes) == ([1, 0, 1], ("0.5", "1.5"))
    with pytest.raises(ValueError, match="task is 'clustering'"):
        load_data(path, task="clustering")


def test_classes_are_called_as_the_file_writes_them(tmp_path):
    lines = [f"{i},{label}" for i, label in enumerate(["07", "+8", "9.0", "7", "8", "9.0"])]
    data = load_data(write(tmp_path, "\n".join(lines)))
    assert (data.classes, data.y.tolist()) == (("07", "+8", "9.0"), [0, 1, 2, 0, 1, 2])
    data = load_data(write(tmp_path, "1,3e0\n2,1.00e+00\n3,3e0\n"))  # as numpy.savetxt writes whole numbers
    assert data.classes == ("1", "3")
    data = load_data(write(tmp_path, "1,True\n2,False\n3,True\n"))
    assert (data.classes, data.y.tolist()) == (("False", "True"), [1, 0, 1])


def test_text_labels_get_ids_in_sorted_order_as_in_scikit_learn(tmp_path):
    names = np.array(["virginica", "setosa", "é", "setosa", "versicolor"])
    encoder = pytest.importorskip("sklearn.preprocessing").LabelEncoder().fit(names)
    lines = "".join(f"{i},{name}\n" for i, name in enumerate(names))
    for path in (savez(tmp_path, X=np.ones((5, 1)), y=names), write(tmp_path, lines)):
        data = load_data(path)
        assert data.y.dtype == np.int64
        np.testing.assert_array_equal(data.y, encoder.transform(names))
        assert data.classes == tuple(encoder.classes_)


def test_csv_written_by_numpy_loads_to_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    X, y, z = rng.normal(size=(40, 5)), np.arange(40) % 4, rng.normal(size=40)
    np.savetxt(tmp_path / "classes.csv", np.c_[X, y], delimiter=",")  # the ids as 1.000e+00
    np.savetxt(tmp_path / "values.csv", np.c_[X, z], delimiter=",", fmt="%.17g")
    for name, expected, dtype in (("classes.csv", y, np.int64), ("values.csv", z, np.float64)):
        data = load_data(tmp_path / name)
        np.testing.assert_array_equal(data.y, expected)
        assert data.y.dtype == dtype
        assert data.features is None
        np.testing.assert_array_equal(data.X, np.loadtxt(tmp_path / name, delimiter=",")[:, :-1])


@pytest.mark.parametrize(
    "text",
    [
        "a,b,label\n1,2,0\n3,4,1\n",
        "1,2,0\n3,4,1\n",
        "1,2,0\n3,4,1",
        "a,b,label\r\n1,2,0\r\n3,4,1\r\n",
        "a,b,label\r1,2,0\r3,4,1\r",
        "\ufeffa,b,label\n1,2,0\n3,4,1\n",
        "\ufeff1,2,0\n3,4,1\n",
        '"a","b, in cm","label"\n"1","2","0"\n"3","4","1"\n',
        '"a;b",b,label\n1,2,0\n3,4,1\n',
        '"a", "b", "label"\n"1", "2", "0"\n"3", "4", "1"\n',
        "a;b;label\n1;2;0\n3;4;1\n",
        "a\tb\tlabel\n1\t2\t0\n3\t4\t1\n",
        "\n\na,b,label\n1,2,0\n\n3,4,1\n\n  \n",
        " a , b , label \n 1 , 2 , 0 \n 3 , 4 , 1 \n",
        "2019,2020,label\n1,2,0\n3,4,1\n",
        "a,\tb,label\n1,\t2,0\n3,\t4,1\n",
    ],
)
def test_csv_dialects_mean_the_same_table(tmp_path, text):
    data = load_data(write(tmp_path, text))
    assert (data.X.tolist(), data.y.tolist(), data.classes) == ([[1, 2], [3, 4]], [0, 1], ("0", "1"))
    assert data.X.dtype == np.float64
    assert (data.features is None) == text.lstrip("\ufeff").startswith("1,")


def test_csv_numbers_are_classes_by_the_same_rule(tmp_path):
    assert load_data(write(tmp_path, "1,7\n2,3\n")).classes == ("3", "7")
    assert load_data(write(tmp_path, "1,7.0\n2,3\n")).classes == ("3", "7.0")
    assert load_data(write(tmp_path, "1,7.5\n2,3\n")).classes is None
    assert load_data(write(tmp_path, "1,7.5\n2,3\n"), task="regression").y.tolist() == [7.5, 3]
    assert load_data(write(tmp_path, "1,7\n2,-3\n"), task="regression").y.tolist() == [7, -3]


def test_csv_target_may_be_any_named_column(tmp_path):
    data = load_data(write(tmp_path, "kind,a,b\n1,5,6\n0,7,8\n"), target="kind")
    assert isinstance(data, Data)
    assert (data.X.tolist(), data.y.tolist(), data.features) == ([[5, 6], [7, 8]], [1, 0], ("a", "b"))


@pytest.mark.parametrize(("header", "rows"), [("0,1,2,3,4", 2), ("0,1,2,3,label", 2), ("1,1,2,3,4", 3), ("4,3,2,1,0", 3)])
def test_a_header_of_numbers_as_pandas_writes_it_is_no_sample(tmp_path, header, rows):
    path = write(tmp_path, header + "\n5,6,7,8,0\n1,2,3,4,1\n")
    data = load_data(path)
    assert (len(data.X), data.features) == (rows, tuple("0123") if rows == 2 else None)
    assert len(load_features(path, 4)) == (rows if "label" not in header else 3)


def test_headerless_text_target_is_not_taken_for_a_header(tmp_path):
    data = load_data(write(tmp_path, "5.1,3.5,setosa\n4.9,3.0,setosa\n6.2,3.4,virginica\n"))
    assert (len(data.X), data.classes, data.features) == (3, ("setosa", "virginica"), None)


@pytest.mark.parametrize(
    "text", ["1,2\n3,4\n", "a,b\n1,2\n3,4\n", "1,2,9\n3,4,9\n", "1,2,cat\n3,4,dog\n", "a,b,c\n1,2,\n3,4,\n"]
)
def test_features_load_with_and_without_a_target_column(tmp_path, text):
    assert load_features(write(tmp_path, text), 2).tolist() == [[1, 2], [3, 4]]


def test_features_are_found_by_the_names_trained_on(tmp_path):
    path = write(tmp_path, "b,note,a\n2,x,1\n4,y,3\n")
    assert load_features(path, 2, features=("a", "b")).tolist() == [[1, 2], [3, 4]]
    line = message(load_features, path, 2, features=("a", "c"))
    assert "has no column 'c', which the model was trained on (it has 'b', 'note', 'a')" in line
    assert load_features(write(tmp_path, "1,2\n3,4\n"), 2, features=("a", "b")).tolist() == [[1, 2], [3, 4]]


def test_a_header_of_some_numbers_is_read_where_it_is_sure_to_be_one(tmp_path):
    path = write(tmp_path, "id,2019,2020,kind\n1,2,3,0\n4,5,6,1\n")
    data = load_data(path, target="kind")
    assert (data.X.tolist(), data.features) == ([[1, 2, 3], [4, 5, 6]], ("id", "2019", "2020"))
    assert load_features(path, 3, features=data.features).tolist() == data.X.tolist()
    years = write(tmp_path, "2019,2020\n1,2\n3,4\n")  # no sample, though each cell is a number
    assert load_features(years, 2, features=("2019", "2020")).tolist() == [[1, 2], [3, 4]]


def test_names_with_underscores_and_of_any_script_are_names(tmp_path):
    data = load_data(write(tmp_path, "a,b,c\n 1 ,2,big_1\n3,\u00a04,\u0661\n5,6,1_0\n"))
    assert (data.X.tolist(), data.classes) == ([[1, 2], [3, 4], [5, 6]], ("1_0", "big_1", "\u0661"))


def test_a_path_may_be_text_and_its_extension_in_capitals(tmp_path):
    assert load_data(str(write(tmp_path, "1,0\n2,1\n", "DATA.CSV"))).y.tolist() == [0, 1]


# --- columns and formats


def test_columns_are_chosen_and_dropped_by_name_and_predicted_from_by_name(tmp_path):
    path = write(tmp_path, 'id,"width, mm",a,kind,note\n7,1,2,x,p\n8,3,4,y,q\n')
    data = load_data(path, drop=("id", "note"))
    assert (data.X.tolist(), data.features, data.classes) == ([[1, 2], [3, 4]], ("width, mm", "a"), ("x", "y"))
    assert load_features(path, 2, features=data.features).tolist() == data.X.tolist()
    data = load_data(path, features=("a", "id"), target="kind")
    assert (data.X.tolist(), data.features) == ([[2, 7], [4, 8]], ("a", "id"))
    assert load_data(path, features=("a", "id"), drop=("id",), target="kind").features == ("a",)
    years = write(tmp_path, "2019,2020,2021\n1,2,0\n3,4,1\n")  # a column is named, so this is a header
    assert load_data(years, drop=("2019",)).features == ("2020",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drop": ("x",)}, "has no column 'x' in its header (it has 'a', 'b', 'c'); name one of these"),
        ({"features": ("a", "d")}, "has no column 'd'"),
        ({"drop": ("a", "b", "c")}, "has no column left when all of them are dropped"),
        ({"drop": ("a", "b")}, "has no column left for the features beside the target 'c'"),
        ({"drop": ("c",), "target": "c"}, "'c' is left out (drop) and the target too"),
        ({"features": ("a", "c")}, "'c' is a feature and the target too; name another column as the target"),
    ],
)
def test_columns_that_cannot_be_chosen_are_refused(tmp_path, options, says):
    assert says in message(load_data, write(tmp_path, "a,b,c\n1,2,0\n3,4,1\n"), **options)


def test_columns_of_an_array_have_no_names(tmp_path):
    path = savez(tmp_path, X=np.ones((3, 2)), y=np.arange(3))
    assert "drop is about the columns of a .csv, and those of X have no names" in message(load_data, path, drop=("a",))
    assert "features is about the columns of a .csv" in message(load_data, path, features=("a",))


def test_truth_values_are_numbers_in_features_and_classes_in_the_target(tmp_path):
    data = load_data(write(tmp_path, "a,b,c\nTrue,1,True\n false ,2,False\n"))
    assert (data.X.tolist(), data.y.tolist(), data.classes) == ([[1, 1], [0, 2]], [1, 0], ("False", "True"))
    assert load_data(write(tmp_path, "TRUE,1,0\nFALSE,2,1\n")).X.tolist() == [[1, 1], [0, 2]]  # and no header


TABLE = "a,b,label\n1,2,0\n3,4,1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.tsv", TABLE.replace(",", "\t").encode()),
        ("data.tsv", b"a\tb, in cm\tlabel\n1\t2\t0\n3\t4\t1\n"),
        ("data.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("DATA.CSV.GZ", gzip.compress(b"\xef\xbb\xbf" + TABLE.encode(), mtime=0)),
        ("data.tsv.gz", gzip.compress(TABLE.replace(",", "\t").encode(), mtime=0)),
        ("data.csv", b"# made by hand, \"today\"\n#\n" + TABLE.encode()),
        ("data.csv", TABLE.replace("\n3", "\n# in between, 1, 2, 3\n3").encode()),
        ("data.csv", b"# 'n' \n1,2,0\n3,4,1\n#end\n"),
        ("data.csv", b'# quoted\n"1",2,0\n#end\n3,4,1\n'),
    ],
)
def test_kinds_of_text_mean_the_same_table(tmp_path, name, content):
    data = load_data(write(tmp_path, content, name))
    assert (data.X.tolist(), data.y.tolist(), data.classes) == ([[1, 2], [3, 4]], [0, 1], ("0", "1"))
    assert load_features(tmp_path / name, 2).tolist() == data.X.tolist()


def test_a_sign_that_is_no_comment_is_read(tmp_path):
    assert load_data(write(tmp_path, "#,a,label\n1,2,0\n2,4,1\n")).features == ("#", "a")
    data = load_data(write(tmp_path, '1,"one\n# two"\n2,x\n'))
    assert data.classes == ("one\n# two", "x")


def test_packed_text_that_is_damaged_or_a_bomb_is_refused(tmp_path, monkeypatch):
    packed = gzip.compress(b"1,2,0\n" * 100)
    assert "is damaged or no gzip file" in message(load_data, write(tmp_path, packed[:-20], "cut.csv.gz"))
    assert "is damaged or no gzip file" in message(load_data, write(tmp_path, TABLE, "text.csv.gz"))
    monkeypatch.setattr(_text, "SMALL", 2**17)
    bomb = write(tmp_path, gzip.compress(b"1,2,0\n" * 2**18), "data.csv.gz")
    peak, line = peak_of(load_data, bomb)
    assert "would unpack to more than 200 times its size" in line
    assert peak < 4e6


def test_npz_arrays_may_have_the_names_of_scikit_learn(tmp_path):
    data = load_data(savez(tmp_path, data=np.ones((4, 2)), target=np.array([5, 7, 7, 5])))
    assert (data.X.shape, data.classes) == ((4, 2), ("5", "7"))
    assert load_features(tmp_path / "data.npz", 2).shape == (4, 2)
    data = load_data(savez(tmp_path, X=np.ones((4, 2)), target=np.arange(4), data=np.zeros((4, 9))))
    assert data.X.shape == (4, 2)


def test_labels_of_text_that_are_objects_are_refused_with_what_to_write(tmp_path):
    path = savez(tmp_path, X=np.ones((2, 2)), y=np.array(["a", "b"], dtype=object))
    assert "and labels that are text as y.astype(str)" in message(load_data, path)


@pytest.mark.parametrize(
    ("cell", "says", "code"),
    [
        ("Paris", "line 3, column 'city' is 'Paris', not a number; write numbers as 1.5", "OneHotEncoder"),
        ("NA", "line 3, column 'city' is 'NA', a missing value; fill it in or remove the line", "SimpleImputer"),
        ("", "line 3, column 'city' is empty; fill it in", "SimpleImputer"),
        ("nan", "line 3, column 'city' is nan; remove that sample", "SimpleImputer"),
        ("2024-01-05", "is '2024-01-05', not a number but a date; make numbers of it", None),
        ("1,5", "is '1,5', not a number; write numbers as 1.5, with a point", "decimal=','"),
    ],
)
def test_what_is_no_number_is_refused_with_the_lines_that_make_one(tmp_path, cell, says, code):
    path = write(tmp_path, f"size;city;price\n1;2;0.5\n2;{cell};1.5\n")
    with pytest.raises(DataError) as caught:
        load_data(path)
    assert says in str(caught.value)
    notes = getattr(caught.value, "__notes__", [])
    assert bool(notes) == bool(code)
    assert code is None or code in "".join(notes)
    if len(notes) == 3:
        assert "'price'" in notes[2]
        assert "\n" not in "".join(notes)
    assert all(line.isprintable() for line in notes)


def test_columns_that_look_like_row_numbers_are_warned_of(tmp_path):
    rng = np.random.default_rng(0)
    values, kinds, page = rng.normal(size=60), np.repeat(["a", "b", "c"], 20), np.repeat([1, 4, 4, 9], 15)
    rows = [f"{i + 100},{v:.3f},{p},{k}" for i, (v, p, k) in enumerate(zip(values, page, kinds, strict=True))]
    path = write(tmp_path, "\n".join(["id,value,page,kind", *rows]))
    first, second = read_data(path).suspicious
    assert first.startswith("data.csv: column 'id' has another whole number in every row")
    assert second.startswith("data.csv: column 'page' is sorted as the classes are")
    with pytest.warns(UserWarning, match="column 'page'"):
        load_data(path, drop=("id",))
    mixed = rng.permutation(60)
    path = write(tmp_path, "\n".join(["id,value,page,kind", *(rows[i] for i in mixed)]))
    assert [line.split("'")[1] for line in read_data(path).suspicious] == ["id"]
    assert read_data(path, drop=("id",)).suspicious == ()
    curve = write(tmp_path, "\n".join(f"{x},{x**1.5}" for x in range(60)))  # x and y of a curve
    assert read_data(curve).suspicious == ()


# --- NumPy's reader and ours


def test_both_readers_see_the_same_table(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    used = []
    real = _csv._by_numpy
    monkeypatch.setattr(_csv, "_by_numpy", lambda *args: used.append(real(*args)) or used[-1])
    for i in range(400):
        path = write(tmp_path, mutated(rng, CSV_FILES[i % len(CSV_FILES)], CSV_TOKENS))
        both = []
        for reader in (_csv._by_numpy, lambda *args: None):
            with monkeypatch.context() as patch:
                patch.setattr(_csv, "_by_numpy", reader)
                try:
                    both.append(load_data(path))
                except DataError as error:
                    both.append(str(error))
        fast, slow = both
        assert isinstance(fast, str) == isinstance(slow, str)
        if isinstance(fast, str):
            assert fast == slow
        else:
            assert (fast.X.tolist(), fast.y.tolist(), fast[2:]) == (slow.X.tolist(), slow.y.tolist(), slow[2:])
    assert 50 < sum(table is not None for table in used) < 350


def test_a_large_table_is_read_by_numpy_and_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(_csv, "_by_rows", None)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(25_000, 4)), rng.integers(0, 3, 25_000)
    lines = [f"{a!r},{b!r},{c!r},{d!r},{k}" for (a, b, c, d), k in zip(X.tolist(), y.tolist(), strict=True)]
    heard = []
    data = read_data(write(tmp_path, "\n".join(["a,b,c,d,kind", *lines])), progress=heard.append).data
    np.testing.assert_array_equal(data.X, X)
    np.testing.assert_array_equal(data.y, y)
    assert heard == [10_000, 20_000]


# --- bad files: each is refused by name, place and remedy


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; write it again"),
        ("\n \n", "holds blank lines only"),
        ("a,b\n", "has a header but no rows"),
        ("1\n2\n", "has one column only; put the features in the first columns and the target in the last"),
        ("a|b\n1|2\n", "in the last, with commas, semicolons or tabs between them (its first line is 'a|b')"),
        ("kind,a\nx,1\n", "a column of text can be what to predict (target), be left out (drop)"),
        ("a,b\n1,0\n2\n", "line 3 has 1 cells but the first row has 2; give every line the same number"),
        ("a,b\n\n1,0,5\n", "line 3 has 3 cells but the first row has 2"),
        ("1,2,0\n1,x,1\n", "line 2, column 2 is 'x', not a number; write numbers as 1.5 or 2e-3"),
        ("a,b,c\n1,x,1\n", "line 2, column 'b' is 'x', not a number"),
        ("a,b\n1;2,0\n", "line 2, column 'a' is '1;2', not a number"),
        ("a;b\n1,5;0\n", "line 2, column 'a' is '1,5', not a number; write numbers as 1.5"),
        ("a,b,c\n1,,1\n", "line 2, column 'b' is empty; fill it in or remove the line"),
        ("a,b,c\n1,2,\n", "line 2, column 'c' is empty"),
        ("a,b,c\n1,2,0\n1,nan,0\n", "line 3, column 'b' is nan; remove that sample or put in a finite number"),
        ("a,b,c\n1,2,0\n-inf,1,0\n", "line 3, column 'a' is -inf"),
        ("1,2,0.5\n1,1e999,0.5\n", "line 2, column 2 is inf"),
        ("a,b,c\n1,2,0\n1,2,NaN\n", "line 3, column 'c' is nan"),
        ("a,c\n1,cat\n2,NaN\n", "line 3, column 'c' is 'NaN', as missing values are"),
        ("a,b,c\n1,2,0\n1,2,x\n", "line 3, column 'c' is 'x' but other targets are numbers; correct it"),
        ("a,b\n1,1" + "0" * 400 + "\n", "line 2, column 'b' is inf"),
        ("0.5,x\n1.5,0\n2.5,1\n", "line 1, column 2 is 'x' but other targets are numbers"),
        ("a,a,b\n1,1,1\n", "two columns are called 'a' in the header; rename one"),
        (",a,b\n0,1,1\n", "column 1 has no name in the header"),
        ('a,b\n"1,0\n2,1\n', "unexpected end of data; correct that line"),
        ('a,b\n"1"2,0\n', "line 2: ',' expected after '\"'"),
        ("a,b\n1\0,0\n", "line 2 holds a NUL byte"),
        (b"a,b\n1,\xff\n", "is not UTF-8 text (it holds the byte 0xff); save it as CSV UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 text"),
        ("a,b\n1," + "x" * 200_000 + "\n", "line 2: field larger than field limit"),
        ("1," * 2_200_000, "line 1 is longer than 4194304 characters"),
        ("a\nb,c\n1,2\n", "has one column only"),
        ("a,b,c\n1_000,2,0\n", "line 2, column 'a' is '1_000', not a number"),
        ("a,b,c\n1,\u0661\u0662,0\n", "line 2, column 'b' is '\u0661\u0662', not a number"),
        ("1,x,0\n3,4,1\n", "the first line has numbers, but its column 2 is 'x'; if it is a sample, correct that cell"),
        ("x,0\n1.5,1\n", "the first line has numbers, but its column 1 is 'x'"),
        ("1,,0\n3,4,1\n", "the first line has numbers, but its column 2 is ''"),
        ("1_000,2,0\n3,4,1\n", "the first line has numbers, but its column 1 is '1_000'"),
        ("id,2019,2020,kind\n1,2,3,0\n", "if it is a header, let each name begin with a letter, or name the target column"),
    ],
)  # fmt: skip
def test_bad_csv_is_refused_by_line_and_column(tmp_path, text, says):
    path = write(tmp_path, text)
    line = message(load_data, path)
    assert line.startswith(f"{path}: ")
    assert says in line
    assert len(line) < 400 + len(str(path))


def test_arguments_of_the_wrong_kind_are_refused_by_name(tmp_path):
    path = write(tmp_path, "a,b,kind\n1,2,x\n1,3,y\n")
    for wrong, words in (
        ({"target": 2}, "^target is 2; give the name of a column"),
        ({"drop": "a"}, r"^drop is 'a', a single str; give a list of names: drop=\['a'\]$"),
        ({"features": "a"}, r"features=\['a'\]$"),
    ):
        with pytest.raises(TypeError, match=words):
            load_data(path, **wrong)
    with pytest.raises(TypeError, match=r"^X is a list, not an array"):
        split([[1.0], [2.0]], np.array([0, 1]))
    with pytest.raises(TypeError, match=r"^y is a list, not an array"):
        split(np.ones((2, 1)), [0, 1])


def code_for(load, path, *args) -> str:
    with pytest.raises(DataError) as refused:
        load(path, *args)
    return "\n".join(getattr(refused.value, "__notes__", ()))


def test_code_is_shown_for_training_alone_and_names_the_target(tmp_path):
    text = "a,b,kind\n1,2,x\n1,,y\n"
    assert code_for(load_data, write(tmp_path, text)).endswith(".fit(table.drop(columns='kind'), table['kind'])")
    assert code_for(load_features, write(tmp_path, text), 2) == ""
    bare = code_for(load_data, write(tmp_path, "1,2,x\n1,,y\n"))
    assert "pandas.read_csv('data.csv', header=None)" in bare
    assert bare.endswith(".fit(table.drop(columns=2), table[2])")


def test_other_kinds_of_tables_are_refused_with_the_line_that_converts_them(tmp_path):
    path = write(tmp_path, "PAR1").rename(tmp_path / "a.parquet")
    assert code_for(load_data, path) == f"  pandas.read_parquet('{path}').to_csv('data.csv', index=False)"
    assert code_for(load_data, path.rename(tmp_path / "a.json")) == ""


def test_csv_target_that_is_no_column_is_refused_with_the_columns(tmp_path):
    path = write(tmp_path, "a,b,c\n1,2,0\n")
    line = message(load_data, path, target="d")
    assert "has no column 'd' in its header (it has 'a', 'b', 'c'); name one of these" in line
    many = write(tmp_path, ",".join(f"c{i}" for i in range(500)) + "\n" + "1," * 499 + "0\n")
    assert "'c9' and 490 more" in message(load_data, many, target="d")


def test_csv_text_target_is_refused_for_regression_and_mixed_ones_are_names_if_asked(tmp_path):
    path = write(tmp_path, "1,cat\n2,dog\n")
    assert "the target is text such as 'cat', but regression needs numbers" in message(load_data, path, task="regression")
    path = write(tmp_path, "1,3\n2,3a\n")
    assert load_data(path, task="classification").classes == ("3", "3a")


def test_features_of_another_width_are_refused(tmp_path):
    assert "has 2 columns but the model takes 3 features" in message(load_features, write(tmp_path, "1,2\n"), 3)
    assert "has 5 columns but the model takes 3 features" in message(load_features, write(tmp_path, "1,2,3,4,5\n"), 3)
    assert "X has 2 features but the model takes 3" in message(load_features, savez(tmp_path, X=np.ones((1, 2))), 3)


X, y = np.ones((3, 2)), np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"X": X}, "has no array 'y' (it has 'X'); write it with numpy.savez(path, X=X, y=y)"),
        ({"images": X, "labels": y}, "has no array 'X' (it has 'images', 'labels')"),
        ({}, "has no array 'X' (it has none)"),
        ({"X": X[0], "y": y}, "X has shape (2,) but must be (samples, features); save it as X.reshape(-1, 1)"),
        ({"X": np.ones((3, 8, 8)), "y": y}, "X has shape (3, 8, 8) but must be (samples, features); save it as X.resh"),
        ({"X": np.float64(1), "y": y}, "X has shape () but must be (samples, features)"),
        ({"X": X[:0], "y": y[:0]}, "X has shape (0, 2): no samples"),
        ({"X": X[:, :0], "y": y}, "X has shape (3, 0): no features"),
        ({"X": X, "y": y[:2]}, "X has shape (3, 2) but y has (2,); save one target for each row of X"),
        ({"X": X, "y": np.float64(1)}, "X has shape (3, 2) but y has ()"),
        ({"X": X, "y": np.ones((3, 2, 2))}, "y has shape (3, 2, 2) but must be (samples,)"),
        ({"X": X, "y": np.ones((3, 0))}, "y has shape (3, 0) but must be (samples,)"),
        ({"X": X, "y": np.eye(3, dtype=int)}, "y has shape (3, 3) but class ids have (samples,); save y.argmax(axis=1)"),
        ({"X": X, "y": np.eye(3)}, "y has shape (3, 3) but class ids have (samples,); save y.argmax(axis=1) if it is one-hot"),
        ({"X": X, "y": np.full((3, 2), "a")}, "the text labels have shape (3, 2) but must be (samples,)"),
        ({"X": X, "y": np.array(["a", "b", ""])}, "y[2] is '', as missing values are; name it or remove that sample"),
        ({"X": np.where(np.arange(6).reshape(3, 2) == 3, np.nan, X), "y": y}, "X[1, 1] is nan; remove that sample"),
        ({"X": X, "y": np.array([0.5, np.inf, 1])}, "y[1] is inf; remove that sample"),
        ({"X": np.full((3, 2), np.longdouble(10) ** 400), "y": y}, "X[0, 0] is inf"),
        ({"X": X * 1j, "y": y}, "array 'X' holds dtype complex128; save numbers as X.astype('float32')"),
        ({"X": np.full((3, 2), "a"), "y": y}, "X holds text; save it as numbers, such as X.astype('float32')"),
        ({"X": np.full((3, 2), b"a"), "y": y}, "array 'X' holds dtype |S1"),
        ({"X": np.zeros((3, 2), "M8[s]"), "y": y}, "array 'X' holds dtype datetime64[s]"),
        ({"X": np.zeros(3, "f4,f4"), "y": y}, "array 'X' holds dtype [('f0', '<f4'), ('f1', '<f4')]"),
    ],
)  # fmt: skip
def test_bad_npz_is_refused_by_array_and_index(tmp_path, arrays, says):
    path = savez(tmp_path, **arrays)
    line = message(load_data, path)
    assert line.startswith(f"{path}: ")
    assert says in line


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_and_never_run(tmp_path):
    Bomb.path = tmp_path / "it ran"
    hostile = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "a.npz", X=hostile, y=y)
    np.savez(tmp_path / "b.npz", X=X, y=hostile)
    bare = zipfile.ZipFile(tmp_path / "c.npz", "w")
    with bare:
        bare.writestr("X.npy", pickle.dumps(Bomb()))
    (tmp_path / "d.npz").write_bytes(pickle.dumps(Bomb()))
    for name, says in (("a", "'X' holds Python objects, which are never loaded"), ("b", "'y' holds Python objects"),
                       ("c", "damaged"), ("d", "damaged or no .npz file (File is not a zip file)")):  # fmt: skip
        assert says in message(load_data, tmp_path / f"{name}.npz")
    assert not Bomb.path.exists()


def test_paths_that_are_no_data_file_are_refused(tmp_path, monkeypatch):
    assert "cannot be read (No such file or directory); check the path" in message(load_data, tmp_path / "none.csv")
    assert "is a folder" in message(load_data, tmp_path)
    assert "is neither a .npz nor a .csv file" in message(load_data, write(tmp_path, "1,0\n", "data.xlsx"))
    assert "is a single array; write both with" in message(load_data, write(tmp_path, "x", "data.npy"))
    assert "is empty" in message(load_data, write(tmp_path, "", "data.npz"))
    assert "embedded null" in message(load_data, "a\0b.csv")
    assert "no\\nne.csv" in message(load_data, tmp_path / "no\nne.csv")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.csv")
        assert "is neither" in message(load_data, tmp_path / "pipe.csv")

    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "1,0\n2,1\n")
    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied); check the path and its permissions" in message(load_data, path)


# --- hostile and damaged archives


def npy(header, payload=b"", version=(1, 0)):
    """A `.npy` file with any header."""
    header = header.encode("latin1") if isinstance(header, str) else header
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header + payload


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def peak_of(call, *args):
    """Most bytes allocated at once by a call that refuses, and its message."""
    tracemalloc.start()
    try:
        line = message(call, *args)
        return tracemalloc.get_traced_memory()[1], line
    finally:
        tracemalloc.stop()


HOSTILE_HEADERS = {
    "terabytes": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 4)}\n", bytes(64)),
    "megabytes": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (500000, 16)}\n", bytes(64)),
    "overflowing": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}\n"),
    "negative": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-8, 1)}\n", bytes(64)),
    "negative twice": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -8)}\n", bytes(64)),
    "short": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2)}\n", bytes(40)),
    "long": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2)}\n", bytes(56)),
    "wide": npy("{'descr': '<U999999999', 'fortran_order': False, 'shape': (3, 2)}\n", bytes(48)),
    "hundreds of digits": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 3000 + ",)}\n"),
    "many digits": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}\n"),
    "nested": npy("(" * 9000),
    "code": npy("__import__('os').abort()"),
    "object": npy("{'descr': '|O', 'fortran_order': False, 'shape': (3, 2)}\n", bytes(48)),
    "bad keys": npy("{'shape': (3, 2)}\n"),
    "bad dtype": npy("{'descr': 'zz', 'fortran_order': False, 'shape': (3, 2)}\n"),
    "python 2": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3L, 3L)}\n", bytes(48)),
    "version 3": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2)}\n", bytes(48), (3, 0)),
    "version 9": npy("", version=(9, 9)),
    "no header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "huge header": npy(b" " * 50_000_000, version=(2, 0)),
    "no magic": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hostile_headers_are_refused_before_memory_is_taken(tmp_path, kind, method):
    path = zipped(tmp_path / "data.npz", {"X.npy": HOSTILE_HEADERS[kind], "y.npy": b""}, method)
    peak, line = peak_of(load_data, path)
    assert len(line) < 400 + len(str(path))
    assert "declares shape" in line or "damaged" in line or "which are never loaded" in line
    assert peak < 4e6


def test_zip_bombs_are_refused_before_they_unpack(tmp_path):
    # An honest header, 80 MB of zeros in 80 kB; and the same with a lie about its packed size.
    header = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 100)}\n")
    path = zipped(tmp_path / "data.npz", {}, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("X.npy", "w") as member:
        member.write(header)
        for _ in range(20):
            member.write(bytes(4_000_000))
    with zipfile.ZipFile(path, "a") as extended:
        extended.writestr("y.npy", npy("{'descr': '|i1', 'fortran_order': False, 'shape': (3,)}\n", bytes(3)))
    packed = archive.getinfo("X.npy").compress_size.to_bytes(4, "little")
    content = path.read_bytes()
    for bomb in (content, content.replace(packed, (300_000_000).to_bytes(4, "little"))):
        path.write_bytes(bomb)
        peak, line = peak_of(load_data, path)
        assert "zip bomb" in line  # said by us, or of the second one by a newer zipfile
        assert peak < 4e6


NEAR_THE_LIMIT = 990_000  # numbers: two arrays of half as many may be unpacked, whatever they shrink by


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (np.zeros((NEAR_THE_LIMIT // 2, 1), np.uint8), np.zeros(NEAR_THE_LIMIT // 2, np.uint8)),
        (np.zeros((NEAR_THE_LIMIT // 61, 60), np.uint8), np.zeros(NEAR_THE_LIMIT // 61, np.int16)),
        (np.zeros((NEAR_THE_LIMIT // 2, 1), np.float16), np.zeros(NEAR_THE_LIMIT // 2, np.float32)),
        (np.zeros((NEAR_THE_LIMIT // 2, 1), np.uint32), np.full(NEAR_THE_LIMIT // 2, "a")),
        (np.zeros((NEAR_THE_LIMIT // 20, 1), bool), np.full(NEAR_THE_LIMIT // 20, "a" * 38)),
    ],
    ids=lambda x: f"{x.dtype} {x.shape}",
)
def test_the_largest_archives_of_nothing_take_a_tenth_of_what_is_allowed(tmp_path, X, y):
    for factor in (1, 2):  # just under the limit, and above it
        many = np.repeat(X, factor, axis=0), np.repeat(y, factor, axis=0)
        np.savez_compressed(tmp_path / "data.npz", X=many[0], y=many[1])
        del many
        tracemalloc.start()
        try:
            if factor == 1:
                assert len(load_data(tmp_path / "data.npz", task="classification").X) == len(X)
            else:
                assert "X and y would unpack" in message(load_data, tmp_path / "data.npz")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (80e6 if factor == 1 else 4e6)  # of 200e6


def test_sparse_pictures_are_no_bomb(tmp_path):
    pictures = np.zeros((20_000, 784), np.uint8)
    pictures[:, ::50] = np.random.default_rng(0).integers(0, 256, (20_000, 16))
    np.savez_compressed(tmp_path / "data.npz", X=pictures, y=np.zeros(20_000))  # and a constant target
    assert load_data(tmp_path / "data.npz", task="regression").X.dtype == np.float32


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_numpy_never_writes_is_refused(tmp_path, method):
    path = zipped(tmp_path / "data.npz", {"X.npy": bytes(1000)}, method)
    assert "packed by a method that NumPy does not write" in message(load_data, path)


def test_a_flipped_bit_in_the_numbers_is_noticed(tmp_path):
    path = savez(tmp_path, X=np.full((3, 2), 0.1), y=y)
    content = path.read_bytes()
    path.write_bytes(content.replace(np.float64(0.1).tobytes(), np.float64(0.2).tobytes(), 1))
    assert path.read_bytes() != content
    assert "is damaged or no .npz file (Bad CRC-32 for file 'X.npy'); write it again" in message(load_data, path)


@pytest.mark.parametrize("character", [0x110000, 0xFFFFFFFF, 0xD800])
@pytest.mark.parametrize("order", "<>")
def test_text_that_is_no_unicode_is_refused(tmp_path, character, order):
    labels = np.array([65, character, 66], f"{order}u4").view(f"{order}U1")
    assert "array 'y' holds text that is no Unicode" in message(load_data, savez(tmp_path, X=X, y=labels))


def test_every_truncation_of_an_archive_is_refused(tmp_path):
    content = savez(tmp_path, X=X, y=y).read_bytes()
    for length in range(1, len(content), 7):
        assert "damaged" in message(load_data, write(tmp_path, content[:length], "cut.npz"))


def mutated(rng, content, tokens):
    """`content` with one to four random edits: bits flipped, parts cut, repeated, or replaced by awkward tokens."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(content) + 1))
        size = int(rng.integers(1, 9))
        match rng.integers(0, 5):
            case 0:
                for i in range(at, min(at + size, len(content))):
                    content[i] ^= 1 << int(rng.integers(0, 8))
            case 1:
                del content[at : at + size]
            case 2:
                content[at:at] = content[at : at + 8 * size]
            case 3:
                content[at : at + size] = tokens[rng.integers(len(tokens))]
            case 4 if rng.random() < 0.2:
                del content[at:]
    return bytes(content)


def attempt(load, *args, **options):
    """What loading gives, or `None` where it refuses, in one line."""
    try:
        loaded, line = load(*args, **options), ""
    except DataError as error:
        loaded, line = None, str(error)
    assert loaded is not None or line.isprintable()
    return loaded


def loads_soundly(path, rng):
    """Whether `path` loads; if so, it must be fit for training."""
    X = attempt(load_features, path, 2)
    assert X is None or (X.shape[1] == 2 and np.isfinite(X).all())
    task, target = rng.choice([None, "classification", "regression"]), rng.choice([None, None, None, "b"])
    data = attempt(load_data, path, task=task, target=target)
    if data is None:
        return False
    X, y, classes, features = data
    assert X.dtype in (np.float32, np.float64)
    assert X.ndim == 2
    assert X.size
    assert np.isfinite(X).all()
    assert len(y) == len(X)
    assert features is None or len(features) == X.shape[1]
    if classes is None:
        assert np.isfinite(y).all()
    else:
        assert y.dtype == np.int64
        assert 0 <= y.min() <= y.max() < len(classes)
        "".join(classes).encode()
    return True


CSV_TOKENS = [
    b'"', b"\n", b"\r", b",", b";", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"nan", b"-inf", b"1e999", b"_", b"", b"-", b".",
    b"99999999", "é".encode(), b"\n\n", b'""', b"9" * 5000, b"x" * 140_000, b"\xf0\x9f\x98\x80",
]  # fmt: skip
CSV_FILES = [
    b"a,b,c\n1,2,0\n3,4,1\n5,6,1\n",
    b'1.5,2.5,"cat"\n3,4,dog\n',
    b"a;b;c\r\n1;2;0.5\r\n3;4;1.25\r\n",
    b"1,2,0\n3,4,1\n",
]
NPY_TOKENS = [
    b"(", b")", b"[", b"'", b"|O", b"<U9", b"<f8", b"<c16", b"<f2", b">i8", b"|V8", b"99999999999", b"-1", b"L", b"{", b"\0",
    b"\xff\xff\xff\xff", b"\x02\x00", b"\x03\x00", b"True", b"()", b"3,", b"\\", b"#", b"\n", b"((2,),",
]  # fmt: skip


def fuzz_csv(folder, count):
    rng = np.random.default_rng(0)
    contents = (mutated(rng, CSV_FILES[i % len(CSV_FILES)], CSV_TOKENS) for i in range(count))
    return sum(loads_soundly(write(folder, content), rng) for content in contents)


def fuzz_npz(folder, count):
    """Half are archives with damaged bytes; half sound archives, whose checksums hold, of damaged `.npy` files."""
    rng = np.random.default_rng(0)
    files, members = [], []
    for save in (np.savez, np.savez_compressed):
        for labels in (y, y * 0.5, np.array(["a", "b", "c"])):
            save(folder / "data.npz", X=X, y=labels)
            files.append((folder / "data.npz").read_bytes())
            with zipfile.ZipFile(folder / "data.npz") as archive:
                members.append({name: archive.read(name) for name in archive.namelist()})
    loaded = 0
    for i in range(count):
        path = folder / f"{i % 2}.npz"
        if i % 2:
            path.write_bytes(mutated(rng, files[i % len(files)], NPY_TOKENS))
        else:
            damaged = {name: mutated(rng, part, NPY_TOKENS) for name, part in members[i % 6].items() if rng.random() < 0.6}
            zipped(path, members[i % 6] | damaged)
        loaded += loads_soundly(path, rng)
    return loaded


@pytest.mark.parametrize("fuzz", [fuzz_csv, fuzz_npz])
def test_fuzzed_files_load_soundly_or_are_refused(tmp_path, fuzz):
    assert 50 < fuzz(tmp_path, 1000) < 950  # some of both, or the mutations are too mild or too wild to show anything


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_csv, fuzz_npz])
def test_many_fuzzed_files_load_soundly_or_are_refused_in_bounded_memory(tmp_path, fuzz):
    tracemalloc.start()
    try:
        fuzz(tmp_path, 5000)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_data_written_by_the_csv_module_comes_back(tmp_path):
    rng = np.random.default_rng(3)
    X = rng.normal(size=(200, 7)) * 10.0 ** rng.integers(-300, 300, size=(200, 7))
    names = ['say "hi"', "two\r\nlines", "a,b", "a;b", " é "]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([[*map(repr, row.tolist()), names[i % 5]] for i, row in enumerate(X)])
    data = load_data(write(tmp_path, buffer.getvalue()))
    np.testing.assert_array_equal(data.X, X)
    assert [data.classes[k] for k in data.y[:5]] == [name.strip() for name in names]


def test_an_archive_of_200_000_members_is_refused_unread(tmp_path: Path) -> None:
    """Its list took seconds to take apart, and many times its size in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("X.npy"), b"")
    data = buffer.getvalue()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = 200_000 * data[start:end]
    tail = bytearray(data[end:])
    tail[12:16] = len(entries).to_bytes(4, "little")
    (tmp_path / "many.npz").write_bytes(data[:start] + entries + tail)
    assert len(zipfile.ZipFile(tmp_path / "many.npz").infolist()) == 200_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="the list of its members is as long as that of 10,000 arrays"):
            load_data(tmp_path / "many.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    np.savez(tmp_path / "some.npz", **{f"a{i}": np.zeros(1) for i in range(1000)}, X=np.eye(3), y=np.arange(3))
    assert load_data(tmp_path / "some.npz").X.shape == (3, 3)


def test_the_lines_that_a_refusal_shows_do_train(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("sklearn")
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    from anyarray_linear.interop.sklearn import LinearNetClassifier

    rng = np.random.default_rng(0)
    cities, sizes = rng.choice(["Rome", "Paris"], 80), rng.normal(size=80)
    kinds = np.where((cities == "Rome") ^ (sizes > 0), "x", "y")
    rows = [f"{city},{'' if i % 9 == 8 else size},{kind}" for i, (city, size, kind) in enumerate(zip(cities, sizes, kinds, strict=True))]
    path = write(tmp_path, "\n".join(["city,size,kind", *rows]))
    with pytest.raises(DataError) as caught:
        load_data(path)
    tools = make_column_selector, make_column_transformer, SimpleImputer, make_pipeline, OneHotEncoder, StandardScaler
    names = {tool.__name__: tool for tool in (*tools, LinearNetClassifier, pandas)}
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that more epochs would help
        exec("\n".join(line.strip() for line in caught.value.__notes__), names)
    table = pandas.read_csv(path)
    assert names["model"].score(table.drop(columns="kind"), table["kind"]) > 0.85
