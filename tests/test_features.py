"""Tests of reading a model's features through its data-parallel wrapper."""

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.distributed import ModuleProxyWrapper
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from torch.nn.parallel import DistributedDataParallel

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import features


class Task:
    """A task with only the dictionaries that building a fairseq model needs."""

    def __init__(self):
        self.source_dictionary = self.target_dictionary = Dictionary()
        for i in range(6):
            self.target_dictionary.add_symbol(f"w{i}")


def transformer(tied: bool) -> TransformerModelBase:
    cfg = TransformerConfig()
    for side in (cfg.encoder, cfg.decoder):
        side.embed_dim, side.ffn_embed_dim, side.layers, side.attention_heads = 8, 8, 1, 1
    cfg.decoder.input_dim = cfg.decoder.output_dim = 8
    cfg.share_decoder_input_output_embed = tied
    return TransformerModelBase.build_model(cfg, Task())


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


NET_INPUT = {
    "src_tokens": torch.tensor([[4, 5, 2]]),
    "src_lengths": torch.tensor([3]),
    "prev_output_tokens": torch.tensor([[2, 4, 5]]),
}


def doubled(_, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Communication hook that doubles the gradients: DDP's usual mean over one worker would leave no trace."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(2 * bucket.buffer())
    return future


@pytest.mark.parametrize("tied", [True, False])
def test_ddp_reduces_every_gradient(process_group, tied):
    """The gradient of the output layer, which is used outside the model's forward, is reduced as well."""
    torch.manual_seed(0)
    bare = transformer(tied).eval()
    wrapped = DistributedDataParallel(bare)
    wrapped.register_comm_hook(None, doubled)
    gradients = []
    for model in (bare, ModuleProxyWrapper(wrapped)):
        bare.zero_grad()
        head = features.head(model, NET_INPUT)
        (head.hidden @ head.weight.t()).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in bare.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(2 * gradient, gradients[1][name]), name


def test_find_unused_parameters_with_an_untied_output_is_refused(process_group):
    """Without the refusal DDP raises in the backward pass, on a parameter marked as ready twice."""
    wrapped = ModuleProxyWrapper(DistributedDataParallel(transformer(False), find_unused_parameters=True))
    with pytest.raises(UserError, match="--find-unused-parameters does not work with an output layer of its own"):
        features.check_student(wrapped)
    tied = ModuleProxyWrapper(DistributedDataParallel(transformer(True), find_unused_parameters=True))
    features.check_student(tied)
    assert features.head(tied, NET_INPUT).hidden.shape == (1, 3, 8)
