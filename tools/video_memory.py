"""Memory of long videos: a clip, played there and back until it is long enough, protected by a process of its own for each length.

    python tools/video_memory.py CLIP [--seconds 10 600] [--method identity_mask] [--out reports/video_memory.json]"""
import argparse, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

def longer(clip, seconds, path):
    "There and back again, 25 frames a second"
    from deidnb.faces.video import read_video
    from deidnb.video.rendered import write_clip
    x = [x for *_, x in read_video(clip)]; n, period = round(25*seconds), max(2*len(x) - 2, 1)
    at = lambda i: min(i % period, period - i % period); return write_clip(path, [x[at(i)] for i in range(n)])

def run(src, dst, method, threads): # -> MB at most, receipt
    env = dict(os.environ, DEIDNB_PASSWORD='four words of no use')
    p = subprocess.Popen([sys.executable, '-m', 'deidnb.cli', 'deid', str(src), '-o', str(dst), '-m', method, '--jobs', str(threads), '--quiet'], env=env)
    _, status, use = os.wait4(p.pid, 0); code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1): raise SystemExit(f'deidnb ended with {code}')
    return use.ru_maxrss/1024, json.loads(dst.with_name(dst.name+'.receipt.json').read_text())

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('clip', type=Path); p.add_argument('--seconds', type=float, nargs='+', default=[10, 600])
    p.add_argument('--method', default='identity_mask'); p.add_argument('--threads', type=int, default=2)
    p.add_argument('--out', type=Path); a = p.parse_args(argv); rows = []
    with tempfile.TemporaryDirectory() as d:
        for s in a.seconds:
            mb, r = run(longer(a.clip, s, Path(d)/f'{s:g}.mp4'), Path(d)/f'{s:g}.out.mp4', a.method, a.threads)
            rows.append(dict(seconds=s, frames=r['frames'], size=f"{r['video']['width']} x {r['video']['height']}", mb=round(mb), covered=r['covered']))
            print(rows[-1], flush=True)
    out = dict(command=f'python tools/video_memory.py CLIP --method {a.method}', machine=f'{os.cpu_count()} CPU cores, {platform.machine()}', threads=a.threads, method=a.method, rows=rows, growth=round(rows[-1]['mb']/rows[0]['mb'] - 1, 3))
    if a.out: a.out.write_text(json.dumps(out, indent=1) + '\n')

if __name__ == '__main__': sys.exit(main())
