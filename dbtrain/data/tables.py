"""Tables with a row for each picture: Parquet, CSV and JSON Lines files, and data sets of the Hub.

A picture is its bytes, or the path of a file beside the table, which may have a mask beside it. Its caption
is another column.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbtrain.data import masks
from dbtrain.data.unpack import PICTURE_BYTES, TEXTS, Item
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

SUFFIXES = (".csv", ".jsonl", ".parquet")
IMAGES = ("image", "file_name", "jpg", "png", "img", "photo", "path")  # names of columns of pictures
ROWS = 16  # of a Parquet file that are in memory
LINE = 1 << 20  # most letters of a line
Row = Mapping[str, Any]


def of_file(names: Sequence[str], options: Mapping[str, str]) -> Iterator[Iterator[Item]]:
    """The pictures of one table."""
    (path,) = map(Path, names)
    return iter([_items(_rows(path), options, path.name, path.parent)])


def of_hub(names: Sequence[str], options: Mapping[str, str]) -> Iterator[Iterator[Item]]:
    """The pictures of a data set, which the `datasets` library downloads, or has in its cache."""
    datasets = _library("datasets", "datasets")
    (name,) = names
    revision, split = options.get("revision"), options.get("split", "train")
    try:
        data = datasets.load_dataset(name, options.get("config"), split=split, revision=revision)
        column = _column(data.column_names, IMAGES, options.get("image"), f"hub:{name}", "image")
        if isinstance(data.features[column], datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))  # the bytes as they are
    except ConfigError:
        raise
    except Exception as error:  # of many libraries
        raise ConfigError(f"prepare.photos: cannot read 'hub:{name}': {reason(error)}") from error
    return iter([_items(data, options, f"hub:{name}", Path(datasets.config.HF_CACHE_HOME))])


def read_too(names: Sequence[str], options: Mapping[str, str]) -> Iterator[str]:
    """The files of a source, and those that a table of text names: its pictures, with their masks."""
    for name in names:
        yield name
        path = Path(name)
        if path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
            for row in _rows(path):
                column = options.get("image") or next((one for one in IMAGES if one in row), "")
                if isinstance(value := row.get(column), str):
                    photo = path.parent / value
                    yield from map(str, filter(None, (photo, masks.file_of(photo))))


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a table. Raises ConfigError if it cannot be read."""
    read = {".csv": _of_csv, ".jsonl": _of_json_lines, ".parquet": _of_parquet}[path.suffix.lower()]
    try:
        yield from read(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"prepare.photos: {path} cannot be read: {reason(error)}") from error


def _of_csv(path: Path) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _of_json_lines(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE), ""), 1):
            if line.strip():
                yield files.json_object(line, f"line {number} of {path}")


def _of_parquet(path: Path) -> Iterator[Row]:
    parquet = _library("pyarrow.parquet", "tables")
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=ROWS):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise ConfigError(f"prepare.photos: {path} cannot be read: {reason(error)}") from error


def _items(rows: Iterable[Row], options: Mapping[str, str], where: str, folder: Path) -> Iterator[Item]:
    """The picture of each row. `folder`: in which the files are that the table names."""
    for number, row in enumerate(rows):
        image = _column(row, IMAGES, options.get("image"), where, "image")
        about = f"row {number} of {where}"
        name, data = _named(row[image])
        path = Path(name) if data is None and name else None
        if path:
            data = _file(path, about, folder)
        if not isinstance(data, bytes):
            raise ConfigError(f"prepare.photos: {about} has no picture, neither bytes nor a path")
        _check_size(len(data), f"the picture in {about}")
        caption = _column(row, TEXTS, options.get("caption"), where, "caption")
        text = None if not caption or row[caption] is None else str(row[caption])
        yield Item(name or f"{number}", data, text, _mask(path, about, folder) if path else None)


def _mask(photo: Path, about: str, folder: Path) -> bytes | None:
    """The mask beside a picture's file, if it has one."""
    whole = folder / photo
    found = masks.file_of(whole)
    return _file(photo.parent / found.relative_to(whole.parent), about, folder) if found else None


def _column(there: Iterable[str], usual: Sequence[str], asked: str | None, where: str, option: str) -> str:
    """The column that is asked for, or else the first of the usual ones; "" if there is no caption."""
    names = list(there)
    found = [name for name in ([asked] if asked else usual) if name in names]
    if not found and (asked or option == "image"):
        what = f"no column '{asked}'" if asked else "no column of pictures that is known"
        raise ConfigError(
            f"prepare.photos: {where} has {what}; add ?{option}=NAME to it, with one of: "
            f"{', '.join(map(str, names[:20]))}"
        )
    return found[0] if found else ""


def _named(value: Any) -> tuple[str, Any]:
    """(name, bytes) of a picture: a path, bytes, or both as the data sets of the Hub have them."""
    name, data = (value.get("path"), value.get("bytes")) if isinstance(value, Mapping) else (value, None)
    if isinstance(value, bytes):
        name, data = "", value
    return name if isinstance(name, str) else "", data


def _file(path: Path, about: str, folder: Path) -> bytes:
    """A file that a table names. Raises ConfigError if it is outside the folder: tables may be anybody's."""
    whole = folder / path
    if not whole.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"prepare.photos: {about} names '{path}', which is outside {folder}; copy it there")
    if not whole.is_file():
        raise ConfigError(f"prepare.photos: {about} names '{path}', which is not a file in {whole.parent}")
    _check_size(whole.stat().st_size, f"the file '{path}' that {about} names")
    return whole.read_bytes()


def _check_size(size: int, what: str) -> None:
    if size > PICTURE_BYTES:
        most = files.size_text(PICTURE_BYTES)
        raise ConfigError(f"prepare.photos: {what} has {files.size_text(size)}; a picture has at most {most}")


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"prepare.photos: this needs {name.partition('.')[0]}; run: pip install 'dbtrain[{extra}]'"
        ) from error
