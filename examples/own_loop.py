"""Your own training loop: Fashion-MNIST at 14×14, which is shipped with the package, by ResNet-20 as 10 local modules.

    pip install .                             # in a checkout of torchlocal
    python examples/own_loop.py               # 5 epochs, a minute or two on one CPU core
    python examples/own_loop.py --steps 10    # see that it runs

It ends with the plain ResNet-20 in resnet20.pt, without a trace of how it was trained.
"""

import argparse
from itertools import count, islice

import torch

import torchlocal as tl
from torchlocal.data import load_data
from torchlocal.models import build_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=350, help="training steps of 128 images (default: 350)")
steps = parser.parse_args().steps
if steps < 1:
    parser.error(f"--steps: must be at least 1, not {steps}")

torch.manual_seed(0)
data = load_data("fashion-mnist-small")
model = build_model("resnet20", num_classes=10, in_channels=1, image_size=data.shape[1:])  # any nn.Module
net = tl.decouple(model, modules=10, sample=(128, *data.shape))
guidance = tl.PhasedGuidance(num_steps=steps)  # the last fifth of the steps is guided
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
# Stays high over the local steps and falls to zero over the guided ones.
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: guidance.cosine(step, steps))

batches = (batch for epoch in count() for batch in data.train.batches(128, epoch=epoch, train=True))
for step, (x, y) in enumerate(islice(batches, steps)):
    losses = net.guided_step(x, y) if guidance(step) else net.local_step(x, y)  # backward is already done
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    if step % 10 == 0 or step == steps - 1:
        print(f"step {step + 1}/{steps}  loss of the first module {losses[0]:.3f}, of the last {losses[-1]:.3f}")

model.eval()
with torch.no_grad():
    correct = sum((model(x).argmax(1) == y).sum().item() for x, y in data.test.batches(500, train=False))
print(f"test accuracy {correct / len(data.test):.3f}")
torch.save(model.state_dict(), "resnet20.pt")
