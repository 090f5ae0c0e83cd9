"Intervals by person, and the forms of a table"
import json, math, re
import numpy as np, pytest
from deidnb.core import ConfigError, InputError, OutputError
from deidnb.measure.tables import Row, Table, decimals, html_report, mean_interval, rate_interval, save_tables, show_value


def test_interval_covers_the_mean_about_95_percent_of_the_time():
    "200 experiments of 60 people; coverage below .88 or above .99 has probability < 1e-3 if the method is right"
    g = np.random.default_rng(0); hit = 0
    for i in range(200):
        people = np.repeat(np.arange(60), 3); x = g.normal(size=60)[people] + .3*g.normal(size=180)
        _, lo, hi, n, m = mean_interval(x, people, 400, rng=np.random.default_rng(i)); hit += lo <= 0 <= hi
    assert (n, m) == (180, 60) and .88 <= hit/200 <= .99


def test_ignoring_people_undercovers():
    "The same data, resampled by picture: the wrong method must be visibly wrong"
    g = np.random.default_rng(1); hit = 0
    for i in range(200):
        x = np.repeat(g.normal(size=30), 10)
        _, lo, hi, *_ = mean_interval(x, None, 300, rng=np.random.default_rng(i))
        hit += lo <= 0 <= hi
    assert hit/200 < .7


def test_bootstrap_matches_a_plain_loop():
    g = np.random.default_rng(2); x, p = g.normal(size=90), g.integers(0, 25, 90)
    who = np.unique(p); boot = []
    for _ in range(4000):
        draw = g.choice(who, len(who)); idx = np.concatenate([np.flatnonzero(p == d) for d in draw]); boot.append(x[idx].mean())
    _, lo, hi, *_ = mean_interval(x, p, 4000)
    assert np.allclose([lo, hi], np.quantile(boot, [.025, .975]), atol=.02)


def test_same_input_same_interval():
    x = np.arange(30.); assert mean_interval(x) == mean_interval(x)
    assert mean_interval(x, rng=np.random.default_rng(1)) != mean_interval(x, rng=np.random.default_rng(2))


@pytest.mark.parametrize('m', [1, 2, 10, 100, 1000])
def test_collapsed_rates_get_the_exact_bound(m):
    from scipy.stats import beta
    v, lo, hi, *_ = rate_interval(np.zeros(m)); assert (v, lo) == (0, 0) and hi == pytest.approx(beta.ppf(.975, 1, m))
    v, lo, hi, *_ = rate_interval(np.ones(m)); assert (v, hi) == (1, 1) and lo == pytest.approx(beta.ppf(.025, m, 1))


def test_wrong_lengths_are_refused():
    with pytest.raises(InputError, match='3 values but 2 groups'): mean_interval([1, 2, 3], [0, 1])


@pytest.mark.parametrize('args,text', [((1.23456, 1.2, 1.3), '1.23 [1.20, 1.30]'), ((1500., 1400., 1600.), '1500 [1400, 1600]'), ((-.5, -.6, -.4), '-0.50 [-0.60, -0.40]'),
    ((0., 0., 0.), '0.000 [0.000, 0.000]'), ((math.nan,), '-'), ((math.inf,), '-'), ((.5, math.nan, math.nan), '0.5000')])
def test_show_value(args, text): assert show_value(*args) == text


def test_decimals_are_bounded(): assert decimals(0, 1e-12) == 5 and decimals(0, 1e9) == 0


NASTY = ['a|b', '<b>&"\'', '</script><script>x()</script>', 'naïve ☃ 名前.jpg', 'x'*300, '=cmd()', 'line\nbreak', ',";']
@pytest.mark.parametrize('name', NASTY)
def test_names_survive_every_form(name, tmp_path):
    t = Table([Row(name, 'm', 1., .5, 1.5, 3, 2, note=name)], title=name, meta={name: name})
    back = Table.from_json(t.to_json()); assert back.rows == t.rows and back.title == name
    import csv, io
    assert list(csv.DictReader(io.StringIO(t.to_csv())))[0]['subject'] == name
    page = html_report(t, name, intro=name); assert '<script' not in page and '<b>' not in page
    assert t.to_markdown().count('\n') == 2
    save_tables(t, tmp_path); assert (tmp_path/'results.html').read_text(encoding='utf-8').startswith('<!doctype html>')


def test_html_loads_nothing():
    page = html_report(Table([Row('a', 'b', 1.)]), 'x', images=[('c', np.zeros((4, 4, 3), np.uint8))])
    assert not re.search(r'(src|href)="(?!data:)', page) and '<link' not in page and '@import' not in page


def test_files_are_valid_json_and_not_overwritten_unless_asked(tmp_path):
    t = Table([Row('a', 'b', math.nan)]); save_tables(t, tmp_path)
    assert json.loads((tmp_path/'results.json').read_text())['rows'][0]['value'] is None
    with pytest.raises(OutputError): save_tables(t, tmp_path, overwrite=False)
    with pytest.raises(ConfigError): save_tables(t, tmp_path, formats=['pdf'])


def test_several_tables(tmp_path):
    p = save_tables([Table([Row('a', 'b', 1.)], 'one'), Table([Row('c', 'd', 2.)], 'two')], tmp_path, 'r')
    assert {x.name for x in tmp_path.iterdir()} == {'r.csv', 'r-2.csv', 'r.json', 'r-2.json', 'r.md', 'r-2.md', 'r.html'}
    text = p['html'].read_text(); assert '<caption>one' in text and '<caption>two' in text


@pytest.mark.parametrize('text', ['', '[]', '{"rows": [{"x": 1}]}', '{"rows": 3}', 'null'])
def test_broken_json(text):
    with pytest.raises(InputError): Table.from_json(text)
