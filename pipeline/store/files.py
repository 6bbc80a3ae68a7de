"""Whether the files that a version names are there: a commit that names a missing one succeeds, and reading fails."""

from __future__ import annotations

from pipeline.store.tables import Database
from pipeline.store.transactions import persistent

_READ = {"data file", "deletion file"}  # an index tells the size of its folder; what is in that, Lance lists from it


@persistent
def damaged_files(db: Database, table: str, version: int) -> list[str]:
    """Files of a version that are missing or have another size than its manifest says; two listings, nothing is read.

    Args:
        db: the database.
        table: the table's name.
        version: one of the table's versions.

    Returns:
        A few words for each file, with its path inside the table.
    """
    try:
        dataset = db.dataset(table, version)
    except (OSError, ValueError):
        return [f"version {version} is not there any more"]
    here = dataset.all_files().read_all().to_pylist()
    sizes = {file["path"]: file["size_bytes"] for file in here}
    base = {file["base_uri"] for file in here}
    expected = {
        f"data/{file.path}": file.file_size_bytes
        for fragment in dataset.get_fragments()
        for file in fragment.metadata.files
    }
    wrong: list[str] = []
    for batch in dataset.tracked_files(min_version=version):
        for file in batch.to_pylist():
            if file["version"] != version or file["type"] not in _READ or file["base_uri"] not in base:
                continue
            size, wanted = sizes.get(file["path"]), expected.get(file["path"])
            if size is None:
                wrong.append(f"the {file['type']} {file['path']} is missing")
            elif size == 0 or (wanted and size != wanted):
                wrong.append(f"the {file['type']} {file['path']} has {size:,} bytes, not {wanted or 'more'}")
    for index in dataset.describe_indices():
        for segment in index.segments:
            folder = f"_indices/{segment.uuid}/"
            found = sum(size for path, size in sizes.items() if path.startswith(folder))
            if not found or (segment.size_bytes and found != segment.size_bytes):
                wanted = f"{segment.size_bytes:,}" if segment.size_bytes else "more"
                wrong.append(f"the index {index.name} in {folder} has {found:,} bytes, not {wanted}")
    return sorted(wrong)
