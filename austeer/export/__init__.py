"""Plans as LoRA adapters, folded checkpoints and GGUF files."""

from .checkpoint import export_checkpoint
from .edits import ExportError, ExportWarning
from .gguf import export_gguf
from .lora import export_lora

__all__ = ["ExportError", "ExportWarning", "export_checkpoint", "export_gguf", "export_lora"]
