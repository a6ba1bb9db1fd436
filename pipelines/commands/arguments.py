"""Arguments that several verbs share, each described once."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Model = Annotated[str, Parameter(help="Hub id, local folder, .gguf file, or demo.")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, Parameter(help="Of the model: auto, float32, bfloat16 or float16.")]
Acts = Annotated[Path, Parameter(help="Folder of an activation cache.")]
Sae = Annotated[Path, Parameter(help="Folder of a trained SAE.")]
Database = Annotated[Path, Parameter(name=["--db"], help="Feature database.")]
SaeId = Annotated[
    int | None, Parameter(help="Which SAE of the database; needed where it holds several.")
]
Limit = Annotated[int, Parameter(help="Rows to show, at most.")]

DEFAULT_ACTS = Path("acts")
DEFAULT_DATABASE = Path("features.duckdb")
