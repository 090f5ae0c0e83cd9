#!/usr/bin/env python
"""Speed of deidnb.morphable on this machine: rendering, fitting one face after its landmarks are known, and M_3D.

Usage: bench_morphable.py [--threads 2] [--seconds 3]   milliseconds, best and median of repeated renders

ICT heads need $DEIDNB_DATA/morphable; without it only spheres are timed. Gradients are with respect to all 261 coefficients.
"""
import argparse, statistics, time, numpy as np, torch
from deidnb.core import data_dir
from deidnb.morphable.build import nobody_model
from deidnb.morphable.fit import solve_light, solve_points, vertex_colours
from deidnb.morphable.model import Coefficients, load_ict, toy_model
from deidnb.morphable.regress import SIDE, m3d, regress_faces, to_tensor
from deidnb.morphable.render import render

def timed(f, seconds):
    "Best and median milliseconds"
    f(); f(); t, start = [], time.perf_counter()
    while len(t) < 5 or time.perf_counter() - start < seconds:
        a = time.perf_counter(); f(); t.append(1e3*(time.perf_counter() - a))
    return min(t), statistics.median(t)

def forward(m, x, n):
    with torch.no_grad(): render(m, Coefficients.unpack(x), (n, n))

def both(m, x, n):
    x = x.detach().requires_grad_(); render(m, Coefficients.unpack(x), (n, n))['image'].sum().backward()

def main():
    p = argparse.ArgumentParser(); p.add_argument('--threads', type=int, default=2)
    p.add_argument('--seconds', type=float, default=2); a = p.parse_args()
    torch.set_num_threads(a.threads); fits(a.seconds); top = data_dir()
    models = {'Nobody': nobody_model(), 'sphere': toy_model(4)}
    if top and (top/'morphable').is_dir(): models |= {f'ICT {k}': load_ict(top/'morphable', k) for k in ('narrow', 'head')}
    for name, m in models.items():
        x = torch.as_tensor(m.sample(16, np.random.default_rng(0)).pack())
        print(f'{name}: {len(m.mean)} vertices, {len(m.triangles)} triangles, {a.threads} threads')
        for what, f, n in (('128 with gradients', both, 128), ('256 forward', forward, 256)):
            (b1, m1), (b16, m16) = timed(lambda: f(m, x[:1], n), a.seconds), timed(lambda: f(m, x, n), a.seconds)
            print(f'  {what:20s} one {b1:6.1f} best {m1:6.1f} median;  16 at once, per face {b16/16:6.1f} best {m16/16:6.1f} median;  ratio {m1/(m16/16):.1f}')

def fits(seconds):
    from deidnb.assets import example_faces
    from deidnb.faces.find import find_faces
    rgb = example_faces(1)[0]; f, M = find_faces(rgb)[0], nobody_model()
    points = lambda: solve_points(M, f.landmarks, rgb.shape[:2], f.blendshapes)
    a, b, R, t = points(); light = lambda: solve_light(M, *vertex_colours(M, rgb, a, b, R, t))
    print('fit: pose, identity and expression %.1f best %.1f median;  light and albedo %.1f best %.1f median'
          % (*timed(points, seconds), *timed(light, seconds)))
    whole = lambda: regress_faces(rgb, [f]); x = to_tensor([np.zeros((SIDE, SIDE, 3), np.uint8)])
    def net():
        with torch.inference_mode(): m3d()(x)
    print('M_3D: network %.1f best %.1f median;  with crop and change of frame %.1f best %.1f median'
          % (*timed(net, seconds), *timed(whole, seconds)))

if __name__ == '__main__': main()
