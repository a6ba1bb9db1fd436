"""Features out of a database: Parquet, JSONL, CSV, labels, Neuronpedia's layout, a static page.

db.export("l6", "parquet")
db.sql("SELECT ...").features().export("found.html", "html")
"""

from .chosen import ExportProgress
from .formats import FORMATS, Format, export
from .neuronpedia_names import NeuronpediaNames

__all__ = ["FORMATS", "ExportProgress", "Format", "NeuronpediaNames", "export"]
