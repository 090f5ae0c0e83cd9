"The fusion network, the three systems that use it, recovery by password, and secrets that must not be written."
import json, os, stat, subprocess, sys
import cv2, numpy as np, pytest
from pathlib import Path
from deidnb.assets import example_faces
from deidnb.core import ConfigError, InputError, package_dir
from deidnb.faces.align import crop_native
from deidnb.faces.find import find_faces
from deidnb.generate import fusion as G

torch = pytest.importorskip('torch')
from deidnb.generate import aad as N
PHOTOS = example_faces(4)

@pytest.fixture(scope='module')
def faces(): return [find_faces(x, max_faces=1)[0] for x in PHOTOS]
@pytest.fixture(scope='module')
def codes(faces):
    from deidnb.identity.experts import load_expert
    return load_expert('sface').encode(PHOTOS, faces)
@pytest.fixture(scope='module')
def crops(faces): return [crop_native(x, f) for x, f in zip(PHOTOS, faces)]
def cosines(images, crops, codes):
    from deidnb.identity.experts import load_expert
    return load_expert('sface').encode(images, [next(iter(find_faces(x, max_faces=1)), c.face) for x,
                                                c in zip(images, crops)]) @ codes.T

# --- network
@pytest.mark.parametrize('norm', [True, False])
def test_aad_is_between_its_two_sources(norm):
    torch.manual_seed(0); a = N.AAD(6, 5, 8, norm); h, x, w = torch.randn(2, 6, 7, 7), torch.randn(2, 5, 7, 7), torch.randn(2, 8)
    with torch.no_grad():
        y = a(h, x, w); a.mask.weight.zero_(); ends = []
        for bias in (-60., 60., 0.): a.mask.bias.fill_(bias); ends.append(a(h, x, w))
    assert torch.allclose(ends[2], (ends[0]+ends[1])/2, atol=1e-5) and not torch.allclose(ends[0], ends[1])
    assert (y >= torch.minimum(ends[0], ends[1]) - 1e-5).all() and (y <= torch.maximum(ends[0], ends[1]) + 1e-5).all()

def test_paper_preset_has_the_documents_sizes():
    with torch.device('meta'):
        net = N.FusionNet(**N.PRESETS['paper']); y = net(torch.zeros(2, 3, 256, 256), torch.zeros(2, 512))
        maps = net.encoder(torch.zeros(2, 3, 256, 256))
    assert y.shape == (2, 3, 256, 256) and len(maps) == 8 and [b.conv2.out_channels for b in net.blocks] == [1024, 1024,
        1024, 512, 256, 128, 64, 3]

def test_gradients_reach_identity_and_attributes():
    f = N.Fuser(**N.PRESETS['compact'])
    z = torch.nn.functional.normalize(torch.randn(1, 128)).requires_grad_()
    base = torch.rand(1, 3, 128, 128, requires_grad=True)
    f(base, torch.ones(1, 1, 128, 128), torch.zeros(1, 1, 128, 128), torch.zeros(1, 128, 128, 2), z).square().mean().backward()
    assert z.grad.abs().sum() > 0 and base.grad.abs().sum() > 0 and all(p.grad is not None for p in f.net.parameters())

@pytest.mark.parametrize('content', [b'', b'not a network', None])
def test_load_refuses_other_files(tmp_path, content):
    p = tmp_path/'x.safetensors'
    if content is not None: p.write_bytes(content)
    with pytest.raises(InputError): N.load_net(p)

def test_hinge():
    s = lambda v: [(torch.full((1, 1, 2, 2), v), [])]
    assert N.hinge_d(s(1.5), s(-1.5)) == 0 and N.hinge_d(s(0.), s(0.)) == 2 and N.hinge_g(s(.7)) == pytest.approx(-.7)

# --- what the network is shown
def test_network_sees_no_fine_detail_of_the_face(faces):
    f, x = faces[0], PHOTOS[0]; M = G.crop_matrix(f.points5, f.landmarks)
    P = G.move_mesh(M, f.landmarks); c = G.warp(x, M, (128, 128)).astype(np.float32)/255
    v = G.view(c, P)
    hard = cv2.dilate((v['mask'] > .02).astype(np.uint8), np.ones((3, 3))) > 0
    # shuffled: means of cells change, everything else is destroyed
    other = c.copy(); other[hard] = np.random.default_rng(0).permutation(c[hard])
    same = G.view(other, P)
    assert np.array_equal(same['base'][~hard], v['base'][~hard]) and np.array_equal(same['lines'], v['lines'])
    small = cv2.resize(v['base'], (8, 8), interpolation=cv2.INTER_AREA)
    again = cv2.resize(small, (128, 128), interpolation=cv2.INTER_LINEAR)
    inner = cv2.erode(hard.astype(np.uint8), np.ones((25, 25))) > 0
    assert np.abs(again - v['base'])[inner].mean() < .3*np.abs(again - c)[inner].mean()

def test_coarse_of_a_flat_face_is_flat():
    hard = np.zeros((128, 128), bool); hard[20:100, 30:90] = True
    x = np.random.default_rng(0).random((128, 128, 3)).astype(np.float32); x[hard] = .4
    assert np.abs(G.coarse(x, hard)[hard] - .4).max() < 1e-4

@pytest.mark.parametrize('weight', [0., .5, 1.])
def test_own_shape_moves_nothing(faces, weight):
    f = faces[1]; P = G.move_mesh(G.crop_matrix(f.points5, f.landmarks), f.landmarks); a = G.own_shape(P, f.blendshapes)
    assert np.abs(G.aim_mesh(P, f.blendshapes, a, a, weight) - P).max() < 1e-3
    moved = np.abs(G.aim_mesh(P, f.blendshapes, a, -a, weight) - P)[:, :2].max(); assert moved == 0 if weight == 0 else moved > .1

# --- generator
def test_swap_puts_the_code_into_the_face(crops, codes):
    out = [G.FusionSwap()(c, codes[(i+1) % 4]) for i, c in enumerate(crops)]; s = cosines([e.image for e in out], crops, codes)
    wanted, own = (np.mean([s[i, (i+k) % 4] for i in range(4)]) for k in (1, 0)); assert wanted > .5 and own < wanted - .2
    for e, c in zip(out, crops):
        assert e.image.dtype == np.uint8 and (e.image[e.mask == 0] == c.image[e.mask == 0]).all() and 0 <= e.mask.min() and e.mask.max() <= 1

@pytest.mark.parametrize('bad', [np.zeros(128), np.full(128, np.nan), np.ones(5), np.ones((2, 128))])
def test_bad_codes(crops, bad):
    with pytest.raises(InputError): G.FusionSwap()(crops[0], bad)

@pytest.mark.parametrize('kw', [dict(weight=-1), dict(detail=2), dict(limit=0)])
def test_bad_settings(kw):
    with pytest.raises(ConfigError): G.FusionSwap(**kw)

def test_length_of_a_code_does_not_matter(crops, codes):
    a, b = (G.FusionSwap()(crops[0], k*codes[1]).image for k in (1, 7)); assert np.abs(a.astype(int)-b).max() <= 1

# --- systems
def test_identity_dp(crops, codes):
    from deidnb.generate.identity_dp import IdentityDP
    one = lambda seed, eps=6.: IdentityDP(eps, simulate=True)(crops[0], rng=np.random.default_rng(seed)).image
    assert np.array_equal(one(0), one(0)) and not np.array_equal(one(0), one(1))
    g = IdentityDP(6.).guarantee; assert g.epsilon == 6 and g.valid
    kept = [cosines([one(0, e)], crops, codes)[0, 0] for e in (1e4, 6.)]; assert kept[0] > kept[1] + .2
    for kw in (dict(mechanism='laplacian'), dict(epsilon=0), dict(mechanism='vmf', sensitivity='paper512')):
        with pytest.raises(ConfigError): IdentityDP(**kw)

def test_keyed_is_a_function_of_password_and_salt(crops, codes):
    from deidnb.generate.keyed import Keyed
    a = Keyed('four random words here', salt='00'*16); b = Keyed('four random words here', salt='00'*16)
    c = Keyed('four random words there', salt='00'*16)
    x, y, z = (k(crops[0]).image for k in (a, b, c)); assert np.array_equal(x, y) and not np.array_equal(x, z)
    assert Keyed('four random words here').drawn['salt'] != Keyed('four random words here').drawn['salt']
    for kw in (dict(password=''), dict(password='x y z w', rotation='round'), dict(password='x y z w', salt='zz'),
               dict(password='x y z w', level=12)):
        with pytest.raises(ConfigError): Keyed(**kw)

@pytest.mark.parametrize('psi', ['opp', 'mlp', 'ved', 'clipped'])
@pytest.mark.parametrize('experts', ['arc', 'mix'])
def test_disguise(crops, codes, psi, experts):
    from deidnb.generate.disguise import Disguise
    d = Disguise(psi, experts, simulate=True); e = d(crops[0], rng=np.random.default_rng(0))
    assert cosines([e.image], crops, codes)[0, 0] < .45 and d.guarantee is not None

def test_disguise_refuses(): 
    from deidnb.generate.disguise import Disguise
    for kw in (dict(psi='none'), dict(experts='ada'), dict(utility='eye'), dict(psi='ved', epsilon=1.)):
        with pytest.raises(ConfigError): Disguise(**kw)

# --- from files to files
@pytest.fixture(scope='module')
def keyed_file(tmp_path_factory):
    t = tmp_path_factory.mktemp('keyed'); src = t/'photo.png'
    cv2.imwrite(str(src), PHOTOS[2][..., ::-1]); (t/'pw').write_text('correct horse battery staple\n')
    (t/'wrong').write_text('correct horse battery stable\n')
    from deidnb.cli import main
    assert main(['deid', str(src), '-o', str(t/'out.png'), '-m', 'keyed', '--set', 'level=3', '--password-file',
                 str(t/'pw'), '--seal', '--quiet']) == 0
    return t

def test_sealed_recovery_is_exact(keyed_file, capsys):
    from deidnb.cli import main
    t = keyed_file; assert not np.array_equal(cv2.imread(str(t/'out.png')), cv2.imread(str(t/'photo.png')))
    assert main(['recover', str(t/'out.png'), '-o', str(t/'exact.png'), '--password-file', str(t/'pw'), '--quiet']) == 0
    assert np.array_equal(cv2.imread(str(t/'exact.png')), cv2.imread(str(t/'photo.png')))
    assert main(['recover', str(t/'out.png'), '-o', str(t/'no.png'), '--password-file',
                 str(t/'wrong')]) == 3 and not (t/'no.png').exists()

def test_network_recovery(keyed_file, codes):
    from deidnb.cli import main
    t = keyed_file
    for name in ('pw', 'wrong'):
        assert main(['recover', str(t/'out.png'), '-o', str(t/f'{name}.png'), '--network', '--password-file',
                     str(t/name), '--quiet']) == 0
    from deidnb.identity.experts import load_expert
    e = load_expert('sface')
    x = [cv2.imread(str(t/f'{n}.png'))[..., ::-1] for n in ('pw', 'wrong', 'out')]
    s = e.encode(x, [find_faces(np.ascontiguousarray(i), max_faces=1)[0] for i in x]) @ codes[2]
    assert s[0] > s[1] + .1 and s[0] > s[2] + .1

def test_no_password_is_written(keyed_file):
    for p in keyed_file.glob('out.png*'): assert b'correct horse' not in p.read_bytes(), p
    r = json.loads((keyed_file/'out.png.receipt.json').read_text())
    assert r['params']['password'] == '(hidden)' and len(r['faces'][0]['info']['salt']) == 32

def test_folder_shares_one_salt_and_hides_secrets(tmp_path):
    from deidnb.pipeline import Deidentifier
    (tmp_path/'in').mkdir()
    for i in range(3): cv2.imwrite(str(tmp_path/'in'/f'{i}.png'), PHOTOS[i][..., ::-1])
    Deidentifier('keyed', password='correct horse battery staple').folder(tmp_path/'in', tmp_path/'out', jobs=2, progress=False)
    found = [json.loads(p.read_text()) for p in (tmp_path/'out').rglob('receipt.json')]
    text = ''.join(p.read_text('utf-8', 'ignore') for p in (tmp_path/'out'/'.deidnb').rglob('*') if p.is_file())
    assert 'correct horse' not in text and len(set(__import__('re').findall(r'"salt": "([0-9a-f]{32})"', text))) == 1 and found

@pytest.mark.parametrize('method,kw', [('donor_swap', dict(choice='key', key='a secret key of mine'))])
def test_receipts_hide_keys(method, kw):
    from deidnb.pipeline import Deidentifier
    d = Deidentifier(method, gate=False, **kw); r = d.photo(PHOTOS[0]).receipt
    assert 'a secret key of mine' not in json.dumps(r) and 'a secret key of mine' not in json.dumps(d.config)

def test_sealing_needs_a_key():
    from deidnb.pipeline import Deidentifier
    with pytest.raises(ConfigError): Deidentifier('blur', seal=True)

def test_password_is_asked_for_not_guessed(tmp_path, monkeypatch):
    from deidnb.cli import main
    monkeypatch.delenv('DEIDNB_PASSWORD', raising=False); cv2.imwrite(str(tmp_path/'p.png'), PHOTOS[0][..., ::-1])
    r = subprocess.run([sys.executable, '-m', 'deidnb.cli', 'deid', str(tmp_path/'p.png'), '-o', str(tmp_path/'o.png'),
                        '-m', 'keyed'], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert r.returncode == 2 and '--password-file' in r.stderr and not (tmp_path/'o.png').exists()

# --- recipe
def test_recipe_runs_and_resumes(tmp_path):
    from deidnb.train import fusion as T
    (tmp_path/'faces').mkdir()
    for i in range(12):
        for j in range(3):
            cv2.imwrite(str(tmp_path/'faces'/f'{i:02d}_{j}.png'), cv2.convertScaleAbs(example_faces(12)[i][..., ::-1],
                    alpha=1-.1*j))
    kw = dict(preset='quick', pictures=tmp_path/'faces', device='cpu', workers=1, progress=False, people=36, held=8)
    one = T.train(tmp_path/'a', **kw); T.train(tmp_path/'a', **kw | dict(steps=6)); assert one[1][-1]['step'] == 6
    assert all(np.isfinite(v) for r in one[1] for v in r.values())
    # once more through the last stage, from a file
    N.save_net(one[0], tmp_path/'one.safetensors', one[2])
    for x in ('people', 'fits.npz'): (tmp_path/'b').mkdir(exist_ok=True); (tmp_path/'b'/x).symlink_to(tmp_path/'a'/x)
    more = T.train(tmp_path/'b', **kw | dict(steps=2, start=tmp_path/'one.safetensors', repel=True))
    assert np.isfinite(more[1][-1]['repel']) and np.array_equal(more[2]['alpha'], one[2]['alpha'])
    change = [float((a-b).abs().max()) for a, b in zip(one[0].parameters(), more[0].parameters())]; assert 0 < max(change) < .05

def test_calm_in_training_is_calm_in_use():
    from deidnb.train.fusion import calmed
    calm = G.calm
    r = np.random.default_rng(0); y = r.random((128, 128, 3), np.float32); yy, xx = np.mgrid[:128, :128]
    mask = np.clip((50 - np.hypot(yy-64, xx-64))/6, 0, 1).astype(np.float32); zone = (yy < 45).astype(np.float32)
    t = lambda x: torch.from_numpy(np.ascontiguousarray(x))[None]
    other = calmed(t(y.transpose(2, 0, 1)), t(zone[None]), t(mask[None]))[0].permute(1, 2, 0).numpy()
    assert np.abs(calm(y, zone, mask) - other)[mask > 0].max() < 1e-3
    assert np.abs(calm(y, zone) - calmed(t(y.transpose(2, 0, 1)), t(zone[None]))[0].permute(1, 2, 0).numpy()).max() < 1e-3   # as DiffDeID uses it
    # what was drawn at the rim and outside makes no difference
    worse = np.where((mask > .8)[..., None], y, 5); assert np.abs(calm(worse, zone, mask) - calm(y, zone, mask))[mask > .1].max() < .05

def test_what_a_second_recogniser_still_knows(faces):
    from deidnb.faces.align import warp
    from deidnb.identity.experts import load_expert
    from deidnb.train.fusion import STRANGERS, repelled
    x = [torch.from_numpy(warp(p, G.crop_matrix(f.points5), (128, 128))).permute(2, 0, 1)[None]/255 for p, f in zip(PHOTOS[:2], faces)]
    net = load_expert('faceres').torch(); cost = lambda a, b: float(repelled(net, torch.cat([a, b])))
    assert abs(cost(x[0], x[0]) - (1-STRANGERS)) < 1e-3 and cost(x[0], x[1]) < .25

@pytest.mark.parametrize('method', ['sampled', 'disguise'])
def test_gated_systems(method):
    from deidnb.pipeline import Deidentifier
    r = Deidentifier(method, seed=1, simulate=True).photo(PHOTOS[3]); f = r.faces[0]
    assert f.outcome == 'protected' and set(f.scores) == {'sface',
                                                          'faceres'} and r.receipt['guarantee']['text'] and all(s['passed']
        for s in f.scores.values())
    again = Deidentifier(method, seed=1, simulate=True).photo(PHOTOS[3]).image
    other = Deidentifier(method, seed=2, simulate=True).photo(PHOTOS[3]).image
    assert np.array_equal(again, r.image) and not np.array_equal(other, r.image)

@pytest.mark.parametrize('method', ['sampled', 'disguise'])
def test_escalation_gets_stronger_and_ends(method):
    from deidnb.methods import METHODS, build
    g = build(METHODS[method], simulate=True); ladder = [g]
    while (n := g.escalate(len(ladder))) is not None:
        assert n.config['weight'] > ladder[-1].config['weight'] and n.config['cell'] == g.config['cell']
        ladder.append(n)
    assert 2 < len(ladder) < 10

def test_plausible_codes_share_what_people_share(codes):
    from deidnb.generate.disguise import plausible
    from deidnb.identity.rotation import face_shape
    s = face_shape().shared; p = np.stack([plausible(-z) for z in codes])
    assert np.allclose(np.linalg.norm(p, axis=1), 1, atol=1e-5) and (p @ s > .2).all() and (-codes @ s < 0).all()
    part = lambda v: (v - (v @ s)[:, None]*s)/np.linalg.norm(v - (v @ s)[:, None]*s, axis=1, keepdims=True)
    assert np.allclose(part(p), -part(codes), atol=1e-4)
