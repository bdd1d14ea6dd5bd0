"""Guidance for personalised text-to-image models: parallel rescaling and its family.

The names below are loaded on first use, so `import parallel_rescale` itself costs nothing.
"""
__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType

_PUBLIC = {  # module -> the names it gives to the top level
    "tiny": ["TINY_SDXL"],
    "cfg": ["cfg"],
    "projection": ["project"],
    "consistency": ["consistency_ratio"],
    "normalization": ["normalize_ratio", "parallel_rescale"],
    "guidance": ["Branch", "Guidance", "CFG", "ConsistencyGuidance", "ParallelRescale", "OrthogonalOnly", "AutoGuidance",
                 "PersonalizationGuidance", "interval", "every", "RULES", "rule"],
    "style_contrast": ["StyleContrast", "NegativeStyle"],
    "adaptive": ["TextFloor", "OwnWords", "Focus", "FocusedContrast"],
    "several": ["SeveralSubjects"],
    "rivals": ["APG", "CFGZero", "TangentialCFG", "FrequencyGuidance", "PerpNeg", "AutoLoRA", "SuperclassMix", "WeakLoRA",
               "LoRAComposite", "switch"],
    "denoiser": ["guided"],
    "pipeline": ["SubjectPipeline", "Record"],
    "subject_folder": ["Subject"],
    "subject": ["load_references", "reference_table"],
    "dco": ["finetune"],
    "evaluate": ["evaluate"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    value = module.known_rules() if name == "RULES" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The functions `cfg` and `evaluate` live in submodules of the same name, which Python would put in their place
    on the package as soon as they are imported; the public name wins instead, whatever the order of imports."""
    def __setattr__(self, name, value):
        if name in _HOME and isinstance(value, ModuleType): value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
