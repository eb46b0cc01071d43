"""base.json: the model that the adapters in a checkpoint belong to."""

from pathlib import Path

from megatron.checkpoint import folder as folders
from megatron.errors import UserError


def describe_base(path: Path) -> dict[str, str]:
    """What an adapter's checkpoint says of its base: where it is, and the hash of its manifest, thus of all files."""
    return {"path": str(path.resolve()), "manifest_sha256": folders.file_hash(path / folders.MANIFEST)}


def read_base(path: Path) -> dict[str, str]:
    """What the checkpoint `path` says of the base of its adapters: "path", and a hash of what was there.

    path: of a checkpoint, or hf:MODEL. Raises UserError.
    """
    document = folders.read_document(path / "base.json")
    if not isinstance(document.get("path"), str):
        raise UserError(f"{path / 'base.json'} does not name a model")
    return document


def find_base(path: Path, folder: str | None = None) -> Path:
    """The checkpoint that is the base of the adapters in the checkpoint `path`: where it was, or in `folder`.

    Raises UserError if it is not there or not the same.
    """
    document = read_base(path)
    there, wanted = Path(document["path"]), document.get("manifest_sha256")
    if wanted is None:
        raise UserError(f"{path} holds adapters of {there}; lora.base ({folder}) has to name that, as hf:MODEL")
    base = there if folder is None else Path(folder) / there.name
    if not (base / folders.MANIFEST).is_file():
        raise UserError(f"{path} holds adapters of {base}, which is missing; lora.base names the folder it is in now")
    if folders.file_hash(base / folders.MANIFEST) != wanted:
        raise UserError(f"{path} holds adapters of a model that was in {there}; what is in {base} is another one")
    if problems := folders.damage(base):
        raise folders.damaged(base, problems)
    return base
