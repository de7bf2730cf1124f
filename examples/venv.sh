# Sourced by the scripts: `make_venv DIR` gives DIR a virtual environment with pip, without root.
# Debian and Ubuntu ship Python without ensurepip; there pip comes from its own wheel, which can run itself.

make_venv() {
    local venv=$1 python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: Python 3.10 or newer is needed, $python is $("$python" -V 2>&1)" >&2
        return 2
    }
    [ -x "$venv/bin/pip" ] && return
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
        return
    fi
    "$python" -m venv --without-pip "$venv"
    local wheel
    wheel=$("$venv/bin/python" - "$venv" <<'PYTHON'
import os, re, sys, urllib.parse, urllib.request

index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
page = urllib.request.urlopen(index, timeout=60).read().decode()
links = re.findall(r'href="([^"]*/(pip-(\d+(?:\.\d+)*)-py3-none-any\.whl)[^"]*)"', page)
href, name, _ = max(links, key=lambda link: [int(part) for part in link[2].split(".")])
path = os.path.join(sys.argv[1], name)
urllib.request.urlretrieve(urllib.parse.urljoin(index, href), path)
print(path)
PYTHON
    )
    "$venv/bin/python" "$wheel/pip" install --quiet "$wheel"
}
