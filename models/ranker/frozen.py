"""Gradient of a frozen network with respect to the table's output, without autograd: the stream's fast path.

A stream trains the table alone. So no graph is recorded, inputs that are not rows get no gradient, and sums are taken
in place. The twin is `recorded_gradient`. The two differ by the rounding of float32 alone.

    x_l+1 = x_0 ⊙ a_l + x_l,   a_l = W_l V_l x_l + b_l        (Wang et al., WWW 2021, eq. 3)

    g = (σ(logit) - label) / mean,   ∂x_L = g w,   ∂a_l = ∂x_l+1 ⊙ x_0,   ∂x_l = ∂x_l+1 + V_lᵀ W_lᵀ ∂a_l
    ∂pooled = Σ_l ∂x_l+1 ⊙ a_l + ∂x_0 + the MLP's gradient, of the columns of the lookups

Shape letters: B batch, K lookups, D dim, W width of the network's input, P = K · D.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.networks.kinds import DEFAULT
from models.networks.tasks import summed_loss
from models.ranker.network import DensePart, Network
from models.table.batch import Batch

Gradient = Callable[[Tensor, Batch, int], tuple[Tensor, Tensor]]
"""Function of the table's output (B, P), its batch with labels, and the number of examples of an offline batch. Returns
logits (B,), or (B, T) of several tasks, and the gradient (B, P) of their loss, summed and divided by that number."""


def gradient_of(network: DensePart) -> Gradient:
    """Returns the fastest gradient of a network whose parameters do not change."""
    if FrozenNetwork.fits(network):
        return FrozenNetwork(network).gradient
    return lambda pooled, batch, mean_of: recorded_gradient(network, pooled, batch, mean_of)


def recorded_gradient(network: DensePart, pooled: Tensor, batch: Batch, mean_of: int) -> tuple[Tensor, Tensor]:
    """Computes a `Gradient` of any network with autograd."""
    leaf = pooled.detach().requires_grad_()
    logits = network(leaf, batch)
    loss = summed_loss(network.tasks, logits, batch.labels) / mean_of
    (gradient,) = torch.autograd.grad(loss, leaf)
    return logits.detach(), gradient


class FrozenNetwork:
    """Forward and backward pass of a default network whose parameters do not change.

    Args:
        network: Dense part for which `fits` is true.
    """

    def __init__(self, network: DensePart) -> None:
        dense = network.network
        assert self.fits(network)
        assert isinstance(dense, Network)
        self._network = network
        cross: Any = dense.cross
        layers_of_cross = zip(cross.W_kernels, cross.V_kernels, cross.bias, strict=True)
        self._cross = [tuple(own.detach() for own in layer) for layer in layers_of_cross]
        layers = [layer for layer in dense.mlp.modules() if isinstance(layer, nn.Linear)]
        self._mlp = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
        head = dense.head.weight.detach().squeeze(0)
        self._of_cross, self._of_mlp = head.split([len(head) - len(self._mlp[-1][1]), len(self._mlp[-1][1])])
        self._bias = dense.head.bias.detach()

    @staticmethod
    def fits(network: DensePart) -> bool:
        """Returns whether a network is frozen, of the default kind and of one label, and attends to no history."""
        default = network.config.kind == DEFAULT and network.config.cross_layers > 0 and bool(network.config.hidden)
        frozen = not any(parameter.requires_grad for parameter in network.parameters())
        return default and frozen and network.tasks is None and not hasattr(network, "attention")

    @torch.no_grad()
    def gradient(self, pooled: Tensor, batch: Batch, mean_of: int) -> tuple[Tensor, Tensor]:
        """Computes a `Gradient`."""
        start = torch.cat([pooled, *self._network.beside(batch)], dim=1)
        end, weighed = self._crossed(start)
        hidden = self._hidden(start)
        logits = torch.addmv(self._bias, end, self._of_cross).addmv_(hidden[-1], self._of_mlp)
        logits = self._network.placed(logits, batch)
        error = torch.sigmoid(logits).sub_(batch.labels).div_(mean_of).unsqueeze(1)
        found = self._through_cross(torch.mul(error, self._of_cross, out=end), start, weighed, pooled.shape[1])
        return logits, self._through_mlp(error * self._of_mlp, hidden, found)

    def _crossed(self, start: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the last x (B, W) and the a of each layer, all (B, W)."""
        end, weighed = start, list[Tensor]()
        for outer, inner, bias in self._cross:
            weighed.append(torch.addmm(bias, end @ inner.t(), outer.t()))
            end = torch.addcmul(end, start, weighed[-1])
        return end, weighed

    def _hidden(self, start: Tensor) -> list[Tensor]:
        """Returns the output of each layer of the MLP, (B, width of the layer)."""
        outputs = [start]
        for weight, bias in self._mlp:
            outputs.append(torch.addmm(bias, outputs[-1], weight.t()).relu_())
        return outputs[1:]

    def _through_cross(self, of_end: Tensor, start: Tensor, weighed: Sequence[Tensor], width: int) -> Tensor:
        """Returns the gradient (B, P) through the cross net. Overwrites `of_end`, the gradient (B, W) of its output."""
        found = of_end[:, :width] * weighed[-1][:, :width]
        for layer in range(len(weighed) - 1, -1, -1):
            outer, inner, _ = self._cross[layer]
            inward = (of_end * start) @ outer
            if layer:
                of_end.addmm_(inward, inner)
                found.addcmul_(of_end[:, :width], weighed[layer - 1][:, :width])
            else:
                found.addmm_(inward, inner[:, :width])
        return found.add_(of_end[:, :width])

    def _through_mlp(self, of_end: Tensor, hidden: Sequence[Tensor], found: Tensor) -> Tensor:
        """Adds the gradient through the MLP to the gradient (B, P) of the cross net.

        Args:
            of_end: (B, width) gradient of the MLP's output.
            hidden: Outputs of the layers.
            found: Gradient to add to, in place.
        """
        for layer in range(len(self._mlp) - 1, -1, -1):
            of_end.mul_(hidden[layer] > 0)
            weight, _ = self._mlp[layer]
            if layer:
                of_end = of_end @ weight
        return found.addmm_(of_end, self._mlp[0][0][:, : found.shape[1]])
