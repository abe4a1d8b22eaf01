"""linear_logprob under FSDP2: two ranks train as one process does without it.

FSDP2 leaves each rank a slice of every parameter, as a DTensor.  The whole parameter, a plain
tensor, is there while the forward and the backward of the module run that ``fully_shard`` was
given.  So:

- the op is called inside that module's forward;
- the head is not given to ``fully_shard`` by itself: it would be gathered for its own forward
  alone, which nobody calls;
- that forward returns the op's tensors: their gradients tell FSDP2 that the backward has come, and
  older versions of it do not look for tensors in a dataclass.

``reshard_after_forward`` may be either.  A trained head is needed again at once, so that False, the
default of the outermost module, saves gathering it twice.

    torchrun --standalone --nproc-per-node 2 kernels/examples/fsdp2.py

trains a tiny model with a loss like CUT's, which raises log p of most tokens and log(1 - p) of
those that were criticised, in each of these ways and prints the losses side by side.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastalign_kernels import linear_logprob

VOCAB, WIDTH, BATCH, LENGTH, STEPS = 1003, 32, 4, 24, 5
IGNORED = -100


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log(1 - p) of the targets, [B * T]; 0 where those are IGNORED."""
        hidden = self.embed(tokens)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=causal, is_causal=True)
        assert not isinstance(self.head.weight, DTensor), "a slice: shard the head with its caller"
        result = linear_logprob(hidden.flatten(0, 1), self.head.weight, target.flatten())
        return result.logprob, result.log1m_prob


def make_batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and which targets were criticised, [B, T]; prompts of several lengths."""
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1))
    prompt = torch.randint(2, LENGTH // 2, (BATCH, 1))
    target = tokens[:, 1:].masked_fill(torch.arange(LENGTH) < prompt, IGNORED)
    criticised = torch.rand(BATCH, LENGTH) < 0.25
    return tokens[:, :-1].to(device), target.to(device), criticised.to(device)


def train(model: nn.Module, batch: tuple[Tensor, ...], share: slice, ranks: int) -> list[float]:
    """Losses of the batch, of which this process has ``share``, before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    count = (batch[1] != IGNORED).sum()  # in the whole batch: ranks have unequal shares of it
    tokens, target, criticised = (tensor[share] for tensor in batch)
    losses = []
    for _ in range(STEPS):
        logprob, log1m_prob = model(tokens, target)
        loss = -torch.where(criticised.flatten(), log1m_prob, logprob).sum() / count
        (loss * ranks).backward()  # FSDP2 takes the mean of the ranks' gradients
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


@torch.no_grad()
def difference(sharded: nn.Module, whole: nn.Module) -> float:
    """Largest |a - b| / |b| over the weights of both."""
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    return max(float((a.full_tensor() - b).norm() / b.norm()) for a, b in pairs)


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= ranks
    device = torch.device(f"cuda:{rank}" if on_gpus else "cpu")
    mesh = init_device_mesh(device.type, (ranks,))
    torch.manual_seed(0)
    batch, start = make_batch(device), Model().state_dict()
    whole = Model().to(device)
    whole.load_state_dict(start)
    columns = {"one process": train(whole, batch, slice(None), 1)}
    differences = {}
    for reshard in (False, True):
        model = Model().to(device)
        model.load_state_dict(start)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        # The outermost module takes what is left: the embedding and the head.
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        name = f"reshard {reshard}"
        columns[name] = train(model, batch, slice(rank, None, ranks), ranks)
        differences[name] = difference(model, whole)
    if rank == 0:
        print("step", *(f"{name:>16}" for name in columns))
        for step, losses in enumerate(zip(*columns.values(), strict=True)):
            print(f"{step:4}", *(f"{loss:16.8f}" for loss in losses))
        for name, value in differences.items():
            print(f"{name}: weights differ by {value:.1e} of their norm")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
