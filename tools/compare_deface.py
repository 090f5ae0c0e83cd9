"""Our `blur` beside the PyPI tool `deface` (CenterFace, Gaussian blur) on the same folder: faces found and seconds.

    python tools/compare_deface.py [--data FOLDER] [--deface VENV] [--out reports/compare_deface.json]

`deface` lives in an environment of its own: python -m venv /tmp/deface_venv; /tmp/deface_venv/bin/pip install deface onnx onnxruntime
Three figures each: a whole folder from a cold start by the command line, and, with everything loaded, the time to find the faces and the
time to find and blur them (reading and writing left out, because the two programs write different JPEG qualities)."""
import argparse, json, os, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import cv2, numpy as np

THEIRS = r'''
import sys, json, time, glob, os
import numpy as np, imageio.v2 as iio, skimage.draw
from deface.centerface import CenterFace
from deface.deface import anonymize_frame
files, in_shape = json.load(open(sys.argv[1])), None
net = CenterFace(in_shape=in_shape, backend='onnxrt', override_execution_provider='CPUExecutionProvider')
ims = [iio.imread(f)[..., :3] for f in files]
for im in ims[:5]: net(im, threshold=.2)
out = []
for f, im in zip(files, ims):
    t = time.perf_counter(); dets, _ = net(im, threshold=.2); t1 = time.perf_counter()-t
    fr = im.copy(); anonymize_frame(dets, fr, mask_scale=1.3, replacewith='blur', ellipse=True, draw_scores=False, replaceimg=None, mosaicsize=20); t2 = time.perf_counter()-t
    out.append(dict(boxes=dets[:, :4].tolist(), find=t1, both=t2))
json.dump(out, open(sys.argv[2], 'w'))
'''

def scenes(folder, n=24, seed=0):
    "Generated faces, alone and pasted into larger plain scenes at many sizes; returns file -> the squares with a person in them"
    from deidnb.assets import example_faces
    g, faces, truth = np.random.default_rng(seed), example_faces(12), {}
    folder.mkdir(parents=True, exist_ok=True)
    def save(name, im, squares):
        cv2.imwrite(str(folder/name), im[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        truth[name] = squares
    for i,f in enumerate(faces): save(f'face_{i:02d}.jpg', f, [(0, 0, 256)])
    for i in range(n):
        h, w = (768, 1152) if i % 2 else (1000, 1000)
        noise = cv2.resize(g.normal(0, 1, (h//40, w//40, 3)).astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        im = np.clip(140 + 30*noise, 0, 255).astype(np.uint8); k, taken = int(g.integers(1, 9)), []
        for _ in range(60):
            if len(taken) == k: break
            s = int(2**g.uniform(5.6, 8.3)); y, x = int(g.integers(0, h-s)), int(g.integers(0, w-s))
            if any(x < b+t and b < x+s and y < a+t and a < y+s for a,b,t in taken): continue
            im[y:y+s, x:x+s] = cv2.resize(faces[g.integers(12)], (s, s), interpolation=cv2.INTER_AREA); taken.append((y, x, s))
        save(f'scene_{i:02d}.jpg', im, taken)
    return truth

def ours(files, threads):
    cv2.setNumThreads(threads)
    from deidnb.core import rng
    from deidnb.faces.io import read_image
    from deidnb.pipeline import Deidentifier
    d = Deidentifier('blur'); ims = [read_image(f).rgb for f in files]
    for im in ims[:5]: d.photo(im)
    out = []
    for im in ims:
        t = time.perf_counter(); faces = d.find(im); t1 = time.perf_counter()-t
        t = time.perf_counter(); r = d.photo(im)
        out.append(dict(boxes=[f.box.tolist() for f in faces], find=t1, both=time.perf_counter()-t,
                        fallback=sum(f.outcome == 'fallback' for f in r.faces)))
    return out

def iou(a, b):
    w, h = min(a[2], b[2])-max(a[0], b[0]), min(a[3], b[3])-max(a[1], b[1])
    return 0 if w <= 0 or h <= 0 else w*h/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-w*h)

def against_truth(boxes, squares):
    "People found, and boxes that belong to nobody"
    centre = lambda b: ((b[0]+b[2])/2, (b[1]+b[3])/2)
    inside = lambda b, q: q[1] <= centre(b)[0] <= q[1]+q[2] and q[0] <= centre(b)[1] <= q[0]+q[2] and b[2]-b[0] > .15*q[2]
    return sum(any(inside(b, q) for b in boxes) for q in squares), sum(not any(inside(b, q) for q in squares) for b in boxes)

def cold(cmd, env=None):
    t = time.perf_counter(); p = subprocess.run(cmd, capture_output=True, text=True, env=env)
    return round(time.perf_counter()-t, 2), p.returncode, p.stderr[-300:]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder of photos (default: generated faces and scenes)')
    p.add_argument('--limit', type=int, default=300, help='at most so many photos, evenly spread')
    p.add_argument('--deface', type=Path, default=Path('/tmp/deface_venv'), help='virtual environment with deface')
    p.add_argument('--out', type=Path, default=Path('reports/compare_deface.json'))
    p.add_argument('--name', help='key of this run in the report (default: name of the folder)')
    a = p.parse_args(); tmp = Path(tempfile.mkdtemp()); threads = os.cpu_count()
    from deidnb.faces.io import list_images
    import warnings; warnings.simplefilter('ignore')
    truth = scenes(tmp/'in') if a.data is None else None
    if a.data:
        files = list_images(a.data); files = files[::max(1, len(files)//a.limit)][:a.limit]; (tmp/'in').mkdir()
        for i,f in enumerate(files): shutil.copy(f, tmp/'in'/f'{i:04d}{f.suffix}')
    files = [str(f) for f in list_images(tmp/'in')]
    (tmp/'files.json').write_text(json.dumps(files)); (tmp/'theirs.py').write_text(THEIRS)
    rounds = {'ours': [], 'deface': []}
    for _ in range(3):  # alternate, so that a busy machine is busy for both
        rounds['ours'].append(ours(files, threads))
        subprocess.run([a.deface/'bin'/'python', tmp/'theirs.py', tmp/'files.json', tmp/'theirs.json'], check=True,
                       capture_output=True)
        rounds['deface'].append(json.loads((tmp/'theirs.json').read_text()))
    shutil.copytree(tmp/'in', tmp/'in2')
    c_theirs = cold([a.deface/'bin'/'deface', *sorted(map(str, (tmp/'in2').iterdir()))])
    c_ours = cold([Path(sys.executable).parent/'deidnb', 'deid', tmp/'in', '-o', tmp/'out', '--method', 'blur',
                   '--on-no-face', 'copy', '--quiet'])
    best = {k: [min(r[i]['both'] for r in v) for i in range(len(files))] for k,v in rounds.items()}
    find = {k: [min(r[i]['find'] for r in v) for i in range(len(files))] for k,v in rounds.items()}
    count = {k: sum(len(x['boxes']) for x in v[0]) for k,v in rounds.items()}
    pairs = [(x['boxes'], y['boxes']) for x,y in zip(rounds['ours'][0], rounds['deface'][0])]
    only = dict(ours=sum(all(iou(b, c) < .2 for c in y) for x,y in pairs for b in x),
                deface=sum(all(iou(b, c) < .2 for c in x) for x,y in pairs for b in y))
    people = None if truth is None else {k: np.array([against_truth(x['boxes'], truth[Path(f).name])
                                                      for f,x in zip(files, v[0])]).sum(0).tolist()
                                         for k,v in rounds.items()}
    res = dict(photos=len(files), faces=count, people=None if truth is None else dict(there=sum(map(len, truth.values())), found={k: v[0] for k,v in people.items()}, boxes_on_nobody={k: v[1] for k,v in people.items()}), found_by_one_only=only,
        photos_without_a_face={k: sum(not x['boxes'] for x in v[0]) for k,v in rounds.items()}, fallback=sum(x['fallback'] for x in rounds['ours'][0]),
        ms_per_photo_find={k: round(1e3*float(np.mean(v)), 2) for k,v in find.items()}, ms_per_photo_find_and_blur={k: round(1e3*float(np.mean(v)), 2) for k,v in best.items()},
        seconds_folder_cold_start=dict(ours=c_ours[0], deface=c_theirs[0]), exit_codes=dict(ours=c_ours[1], deface=c_theirs[1]),
        cpus=threads, python=platform.python_version(), deface=subprocess.run([a.deface/'bin'/'pip', 'show', 'deface'], capture_output=True, text=True).stdout.split('\n')[1])
    old = json.loads(a.out.read_text()) if a.out.is_file() else {}
    old[a.name or (a.data.name if a.data else 'generated')] = res
    a.out.parent.mkdir(exist_ok=True); a.out.write_text(json.dumps(old, indent=1)+'\n'); print(json.dumps(res, indent=1))
    shutil.rmtree(tmp)

if __name__ == '__main__': main()
