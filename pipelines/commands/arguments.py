"""Arguments that several verbs share, each described once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token
from pydantic import ByteSize, TypeAdapter, ValidationError

from ..config import require_local
from ..errors import PipelineError


def _bytes_of(_: Any, tokens: Sequence[Token]) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(tokens[0].value))
    except ValidationError as error:
        raise PipelineError(f"{tokens[0].value}: expected a size such as 20GB or 500MB") from error


def _local(_: object, path: Path) -> None:
    require_local(path)


Bytes = Annotated[int, Parameter(converter=_bytes_of)]
Local = Annotated[Path, Parameter(validator=_local)]
"""What lies on this machine."""
Model = Annotated[str, Parameter(help="Hub id, local folder, .gguf file, or demo.")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, Parameter(help="Of the model: auto, float32, bfloat16 or float16.")]
Place = str
"""A folder or a URL, as it was typed: a Path would make s3:/bucket of s3://bucket."""
Acts = Annotated[Place, Parameter(help="Folder or URL of an activation cache.")]
Sae = Annotated[Path, Parameter(help="Folder of a trained SAE.")]
Database = Annotated[
    Place,
    Parameter(name=["--db"], help="Feature database: a file; of buckets, a folder or URL."),
]
SaeId = Annotated[
    int | None, Parameter(help="Which SAE of the database; needed where it holds several.")
]
Limit = Annotated[int, Parameter(help="Rows to show, at most.")]

DEFAULT_ACTS = "acts"
DEFAULT_DATABASE = "features.duckdb"
