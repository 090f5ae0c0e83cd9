"""Time a face takes: find and mesh, `donor_swap` with and without its gate, every other method; on 256 px faces in photos of one megapixel, everything loaded.

    python tools/speed.py [--out reports/speed.json]

Each of the twelve generated example faces stands in a plain photo of 1000 x 1000 px. The first round is not counted; run it on an idle machine."""
import argparse, json, os, platform, sys, time
from pathlib import Path
import cv2, numpy as np

def scenes(side=1000, face=256):
    "The example faces, each in a photo, with the detector's box about `face` px high"
    from deidnb.assets import example_faces
    from deidnb.faces.find import find_faces
    for p in example_faces(12):
        k = face / find_faces(p, mesh=False)[0].size
        q = cv2.resize(p, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC); h = len(q)
        photo = np.full((side, side, 3), 128, np.uint8); a = (side-h)//2; photo[a:a+h, a:a+h] = q
        yield photo

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=2); a = p.parse_args(argv)
    cv2.setNumThreads(a.threads)
    from deidnb import Deidentifier
    from deidnb.methods import METHODS
    photos, kinds = list(scenes()), dict(donor_swap=Deidentifier('donor_swap'),
                                         donor_swap_without_gate=Deidentifier('donor_swap', gate=False),
                                         sampled_without_gate=Deidentifier('sampled', gate=False))
    kinds |= {m: Deidentifier(m, **{k: 'four random words here' for k in row.needs}) for m, row in METHODS.items()
              if m not in kinds and not row.needs_set}
    finder, ms, attempts = kinds['donor_swap'].finder, {}, []
    def rounds(f): # what f gives for every photo, the first round left out
        return [f(p) for _ in range(a.rounds+1) for p in photos][len(photos):]
    def find(photo): t = time.perf_counter(); finder.find(photo); return 1e3*(time.perf_counter()-t)
    found = {id(p): finder.find(p) for p in photos}; ms['find'] = rounds(find)
    for k, d in kinds.items():
        recs = rounds(lambda p: max(d.photo(p, found[id(p)]).faces, key=lambda f: f.ms)); ms[k] = [r.ms for r in recs]
        if k == 'donor_swap': attempts = [r.attempts for r in recs]
    out = dict(command='python tools/speed.py', machine=f'{os.cpu_count()} CPU cores, {platform.machine()}', threads=a.threads, face_px=256, photo='1000 x 1000', rounds=a.rounds,
               ms={k: dict(median=round(float(np.median(v)), 1), p90=round(float(np.quantile(v, .9)), 1)) for k, v in ms.items()}, attempts=round(float(np.mean(attempts)), 2))
    print(json.dumps(out, indent=1))
    if a.out: a.out.write_text(json.dumps(out, indent=1) + '\n')

if __name__ == '__main__': sys.exit(main())
