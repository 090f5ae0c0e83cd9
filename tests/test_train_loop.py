"The training loop: the same numbers whether a run is interrupted or not, and checkpoints that execute nothing"
import numpy as np, pytest, torch
from torch import nn
from deidnb.core import ConfigError
from deidnb.train import loop as L

def setup(folder, steps=60, **kw):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    opt = torch.optim.AdamW(net.parameters(), .01)
    plan = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1/(1+i)); ema = L.Ema(net, .9)
    def draw(r): x = torch.as_tensor(r.normal(size=(16, 3)), dtype=torch.float32); return x, x.sum(1, keepdim=True)
    def step(b, i):
        loss = (net(b[0]) - b[1]).square().mean(); L.descend(opt, loss); plan.step()
        ema.update(net); return dict(loss=loss.item())
    return L.run(step, draw, steps, folder, dict(net=net, opt=opt, plan=plan, ema=ema), progress=False, each=5,
                 **kw), net, ema.net

class Any:
    def load_state_dict(self, s): pass

@pytest.mark.parametrize('threads', [1, 3])
def test_resumed_run_is_the_same_run(tmp_path, threads):
    log, a, ea = setup(tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): # killed in the middle of step 23; the last checkpoint is that of step 20
        n = [0]
        original = L.descend
        try:
            def dies(*x, **k):
                n[0] += 1
                if n[0] == 23: raise KeyboardInterrupt
                return original(*x, **k)
            L.descend = dies; setup(tmp_path/'b', threads=threads, every=0)
        finally: L.descend = original
    again, b, eb = setup(tmp_path/'b', threads=threads)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(),
                                                 b.state_dict().values())) and all(torch.equal(x, y) for x,
        y in zip(ea.state_dict().values(), eb.state_dict().values()))
    assert again[-1]['step'] == 60 and again[-1]['loss'] == log[-1]['loss']

def test_finished_run_does_nothing(tmp_path):
    log, a, _ = setup(tmp_path); again, b, _ = setup(tmp_path)
    assert again == log and torch.equal(a[0].weight, b[0].weight)

def test_checkpoint_is_not_executed(tmp_path):
    class Bad:
        def __reduce__(self): return (open, (str(tmp_path/'owned'), 'w'))
    torch.save(dict(step=1, log=[], parts=dict(net=Bad())), tmp_path/'checkpoint.pt')
    with pytest.raises(ConfigError, match='cannot be read'): L.load_checkpoint(tmp_path, dict(net=nn.Linear(1, 1)))
    assert not (tmp_path/'owned').exists()

def test_broken_checkpoint_says_so(tmp_path):
    (tmp_path/'checkpoint.pt').write_bytes(b'half a file')
    with pytest.raises(ConfigError, match='checkpoint.pt'): L.load_checkpoint(tmp_path, dict(net=nn.Linear(1, 1)))

def test_workers_fail_loudly():
    def draw(r): raise ValueError('no data')
    with pytest.raises(ValueError, match='no data'): list(L.batches(draw, 0, 0, 5, threads=2))

def test_the_mean_forgets_its_start():
    net = nn.Linear(2, 2); e = L.Ema(net, .99)
    with torch.no_grad(): net.weight.fill_(3)
    for _ in range(2000): e.update(net)
    assert torch.allclose(e.net.weight, net.weight, atol=1e-3) and not e.net.training
