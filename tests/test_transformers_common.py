"""transformers' own common tests of models and processors, run on ours.

They are not in its wheel but in its source archive. Fetch it once, beside the tests' other data:
    pip download --no-deps --no-binary transformers -d /tmp transformers==<the version installed>
unpack it, and name its folder in TRANSFORMERS_SOURCE; without it this file is skipped."""
import os, sys, types, unittest
from pathlib import Path

import pytest, torch

SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", "/nowhere"))
if not (SOURCE / "tests" / "test_modeling_common.py").exists():
    pytest.skip("TRANSFORMERS_SOURCE names no source of transformers", allow_module_level=True)

from ctvlm.model import CTVLMConfig, CTVLMModel, CTVLMProcessor
from ctvlm.text import train_tokenizer

# What the archive leaves out, and what our models have no use for: export, generation, tables of cases.
for name, holds in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
    module = types.ModuleType(f"tests.{name}")
    setattr(module, holds, type(holds, (), {}))
    sys.modules |= {f"tests.{name.split('.')[0]}": types.ModuleType("tests"), f"tests.{name}": module}
if "parameterized" not in sys.modules:
    table = types.ModuleType("parameterized")
    table.parameterized = types.SimpleNamespace(expand=lambda *a, **k: lambda f: unittest.skip("a table of cases")(f))
    sys.modules["parameterized"] = table
package = types.ModuleType("tests")
package.__path__ = [str(SOURCE / "tests")]
sys.modules["tests"] = package
fetch = types.ModuleType("fetch_hub_objects_for_ci")            # pictures and films, which nothing here looks at
fetch.url_to_local_path = lambda url: url
sys.modules["fetch_hub_objects_for_ci"] = fetch
from tests.test_modeling_common import ModelTesterMixin
from tests.test_processing_common import ProcessorTesterMixin

# Why a test of theirs does not apply to ours. Everything else must pass.
HIDDEN, LOSS = "hidden states and attentions are not given back", "losses belong to the training, not to the model"
APART = {
    "test_can_capture_specific_layers_hidden_states": HIDDEN, "test_capture_outputs_decorator": HIDDEN,
    "test_get_image_features_hidden_states": HIDDEN, "test_get_text_features_hidden_states": HIDDEN,
    "test_hidden_states_output": HIDDEN, "test_retain_grad_hidden_states_attentions": HIDDEN,
    "test_training": LOSS, **{f"test_training_gradient_checkpointing{x}": LOSS + "; chapter towers compares gradients"
                              for x in ("", "_use_reentrant_false", "_use_reentrant_true")},
    "test_from_pretrained_no_checkpoint": "a folder is always named",
    "test_load_save_without_tied_weights": "whether word vectors are tied stands in the text encoder's own configuration",
    "test_model_weights_reload_no_missing_tied_weights": "missing weights are refused, never filled in",
    "test_model_outputs_equivalence": "it subtracts, and `valid` is of bools; see test_saving.py"}


class Tester:
    "A small model and its inputs, as the common tests ask for them."
    is_training = True

    def __init__(self): self.batch_size = 2

    def prepare_config_and_inputs_for_common(self):
        sizes = dict(width=24, depth=2, heads=2, layer_scale=1.)
        text = dict(CTVLMConfig.tiny(99).text, hidden_size=32, intermediate_size=48, num_attention_heads=2,
                    num_key_value_heads=1)
        config = CTVLMConfig.tiny(99, window=(16, 16, 16), patch=(8, 8, 4), window_encoder=sizes, text=text,
                                  scan_encoder={**sizes, "rope_base": 100.}, head_widths=(24, 24, 16), projection_dim=16)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 99, (2, 7), generator=g)
        windows = torch.rand(4, 1, 16, 16, 16, generator=g)
        return config, dict(windows=windows, grid=torch.tensor([[1, 1, 2]] * 2), input_ids=ids,
                            attention_mask=torch.ones_like(ids))


class TestCommon(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTVLMModel,)
    has_attentions = False               # none is given back
    test_resize_embeddings = False       # the tokenizer is the model's own
    test_mismatched_shapes = False       # refused, see test_saving.py

    def setUp(self):
        self.model_tester = Tester()
        why = APART.get(self._testMethodName)
        if why: self.skipTest(why)


PICTURES, TENSORS = "it gives pictures, ours are volumes", "return_tensors is 'pt', the only kind there is"
PROCESSOR_APART = {
    "test_call_arguments_default_none": TENSORS, "test_call_arguments_not_in_processor_kwargs": TENSORS,
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": PICTURES,
    "test_model_input_names": PICTURES + "; test_saving.py gives what ours returns to the model"}


class TestProcessorCommon(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CTVLMProcessor

    @classmethod
    def _setup_tokenizer(cls): return train_tokenizer(["There is a cyst in the liver.", "lower newer"], 300)

    def setUp(self):
        why = PROCESSOR_APART.get(self._testMethodName)
        if why: self.skipTest(why)
