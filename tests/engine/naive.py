"""The suffix engine's definition: whole padded rows through the whole model, with a hook that adds delta after layer L."""

import copy
from types import MethodType

import torch
import torch.nn.functional as F
from rose_engine.architecture import decoder_of

# Rows are padded on the right, which causality makes invisible: products with fewer than a dozen rows take another path in the
# CPU's matrix library and are off by up to 3e-4 in a row's gradient.
WIDTH = 64


def run(model, row):
    """Logits [WIDTH, V] of a row, padded."""
    tokens = F.pad(torch.tensor(row.tokens), (0, max(0, WIDTH - len(row.tokens))))
    return model(input_ids=tokens[None]).logits[0]


def in_float64(model):
    """A float64 copy of a model, its RMS norms too, which the library computes in float32."""
    model = copy.deepcopy(model).double()

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model


def naive_row(model, row, layer: int, delta, reference=None):
    """Loss and gradient [d] of one row with delta [d] added at its subject's last token; KL to `reference` where it has no target."""
    delta = delta.clone().requires_grad_()

    def add(module, args, output):
        place = F.one_hot(torch.tensor(row.last), output.shape[1]).to(output)
        return output + place[None, :, None] * delta.to(output)

    hook = decoder_of(model).layers[layer].register_forward_hook(add)
    try:
        logits = run(model, row).log_softmax(-1)
    finally:
        hook.remove()
    if row.target < len(row.tokens):
        places = torch.arange(row.target, len(row.tokens))
        loss = -logits[places - 1, torch.tensor(row.tokens)[places]].mean()
    else:
        loss = (reference.exp() * (reference - logits[row.last])).sum()
    return loss.detach(), torch.autograd.grad(loss, delta)[0]


def unedited_prediction(model, row):
    """Log-probabilities [V] after the row's last subject token."""
    with torch.no_grad():
        return run(model, row)[row.last].log_softmax(-1)
