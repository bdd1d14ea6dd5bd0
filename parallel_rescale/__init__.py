"""Guidance for personalised text-to-image models: parallel rescaling and its family.

The names below are loaded on first use, so `import parallel_rescale` itself costs nothing. The sub-packages
are the parts of the book in `nbs/`: tools, method, machine, subject, evidence, world, use.
"""
__version__ = "0.1.0"

import logging
from importlib import import_module

# transformers recommends torchvision, which nothing here needs, as the first, red output of a notebook
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

_PUBLIC = {  # module -> the names it gives to the top level
    "tools.embedded": ["TINY_SDXL"],
    "method.classifier_free": ["cfg"],
    "method.projection": ["project"],
    "method.consistency": ["consistency_ratio"],
    "method.parallel_rescaling": ["normalize_ratio", "parallel_rescale"],
    "method.guidance": ["Attention", "Branch", "Guidance"],
    "method.rules": ["CFG", "ConsistencyGuidance", "ParallelRescale", "OrthogonalOnly", "AutoGuidance",
                     "PersonalizationGuidance"],
    "method.schedules": ["interval", "every"],
    "method.registry": ["RULES", "rule"],
    "method.style_contrast": ["StyleContrast", "NegativeStyle"],
    "method.focus": ["TextFloor", "OwnWords", "Focus", "FocusedContrast"],
    "method.several": ["SeveralSubjects"],
    "method.attention": ["PerturbedAttention", "SkipLayer", "EntropyRectifying"],
    "method.rivals": ["APG", "CFGZero", "TangentialCFG", "FrequencyGuidance", "PerpNeg", "AutoLoRA", "SuperclassMix",
                      "WeakLoRA", "LoRAComposite", "switch"],
    "machine.denoiser": ["guided"],
    "machine.guide": ["guide"],
    "machine.record": ["Record"],
    "machine.pipeline": ["SubjectPipeline"],
    "machine.saved_subject": ["Subject"],
    "machine.universal": ["universal"],
    "subject.references": ["load_references"],
    "subject.backgrounds": ["reference_table"],
    "subject.finetuning": ["finetune"],
    "evidence.evaluation": ["evaluate"],
    "use.explorer": ["explore"],
    "use.guider": ["RuleGuider"],
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
