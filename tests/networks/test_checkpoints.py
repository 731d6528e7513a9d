"""SAM 2.1 checkpoints are fetched and loaded whole or not at all, and every error says what to change."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import monai.apps.utils
import pytest
import torch
from monai.bundle import download_large_files
from safetensors.torch import save_file

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.networks import (
    BACKBONES,
    SAM2SGP,
    fetch_checkpoint,
    load_sam2_checkpoint,
    save_weights,
)
from sam2sgp.networks.sam2_sgp import IMAGENET_MEAN, IMAGENET_STD

LISTING, TINY = "models/large_files.yml", "models/sam2.1_hiera_tiny.pt"


class Server(ThreadingHTTPServer):
    """Serves one content at any path; closes half-way through the next `interruptions` downloads."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = bytes(range(256)) * 4000
        self.interruptions = 0
        self.with_length = True
        self.downloads = 0
        self.url = f"http://127.0.0.1:{self.server_port}/sam2.1_hiera_tiny.pt"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        if self.server.with_length:
            self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        content = self.server.content
        self.server.downloads += 1
        if self.server.interruptions:
            self.server.interruptions -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def bundle_root(tmp_path, server):
    root = tmp_path / "bundle"
    root.mkdir()
    list_file(root, server.url, hashlib.sha256(server.content).hexdigest())
    return root


def list_file(root, url, hash_val):
    text = (
        f'large_files:\n- path: "{Path(TINY).name}"\n  url: "{url}"\n  hash_val: "{hash_val}"\n  hash_type: "sha256"\n'
    )
    (root / "models").mkdir(exist_ok=True)
    (root / LISTING).write_text(text)


def files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@torch.inference_mode()
def test_fetched_checkpoint_loads_strictly_and_gives_sam2s_features(
    server, bundle_root, tiny_checkpoint, sam2_reference
):
    server.content = tiny_checkpoint.read_bytes()
    list_file(bundle_root, server.url, hashlib.sha256(server.content).hexdigest())
    network = SAM2SGP("tiny", 256, fetch_checkpoint("tiny", bundle_root)).eval()
    image = torch.rand(1, 3, 256, 256)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = sam2_reference(256).forward_image((image - mean) / std)["vision_features"]
    torch.testing.assert_close(network.encode(image).embedding, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_is_downloaded_once_and_logged(server, bundle_root, caplog):
    caplog.set_level("INFO", "sam2sgp")
    path = fetch_checkpoint("tiny", bundle_root)
    assert path == bundle_root / TINY
    assert path.read_bytes() == server.content
    assert f"Downloading {server.url} (1.0 MB) to {path}" in caplog.text
    assert fetch_checkpoint("tiny", bundle_root) == path
    assert server.downloads == 1
    assert files(bundle_root) == {LISTING, TINY}


def test_monais_own_download_command_is_understood(server, bundle_root):
    download_large_files(bundle_path=str(bundle_root / "models"))
    assert fetch_checkpoint("tiny", bundle_root).read_bytes() == server.content
    assert server.downloads == 1


@pytest.mark.parametrize("with_length", [True, False])
def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(server, bundle_root, with_length):
    server.interruptions, server.with_length = 1, with_length
    with pytest.raises(WeightsError, match="run again"):
        fetch_checkpoint("tiny", bundle_root)
    assert files(bundle_root) == {LISTING}
    assert fetch_checkpoint("tiny", bundle_root).read_bytes() == server.content


def test_a_stop_while_the_file_is_put_in_place_leaves_no_half_file(bundle_root, monkeypatch):
    def stopped(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(monai.apps.utils.shutil, "move", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch_checkpoint("tiny", bundle_root)
    assert files(bundle_root) == {LISTING}


def test_a_download_with_another_hash_is_refused(server, bundle_root):
    list_file(bundle_root, server.url, "0" * 64)
    with pytest.raises(WeightsError, match=r"sha256 hash check.*run again"):
        fetch_checkpoint("tiny", bundle_root)
    assert files(bundle_root) == {LISTING}


def test_a_file_with_another_hash_is_refused_and_kept(server, bundle_root):
    path = fetch_checkpoint("tiny", bundle_root)
    path.write_bytes(server.content[:-1])
    with pytest.raises(WeightsError, match=r"sam2\.1_hiera_tiny\.pt: its sha256 differs.*delete it and run again"):
        fetch_checkpoint("tiny", bundle_root)
    assert path.read_bytes() == server.content[:-1]


def test_an_unreachable_server_is_an_error_with_address_and_place(server, bundle_root):
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsError) as error:
        fetch_checkpoint("tiny", bundle_root)
    assert server.url in str(error.value)
    assert str(bundle_root / TINY) in str(error.value)


def test_a_denied_download_is_an_error(bundle_root, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(monai.apps.utils, "_download_with_progress", denied)
    with pytest.raises(WeightsError, match="permission denied"):
        fetch_checkpoint("tiny", bundle_root)


def test_only_listed_checkpoints_of_real_backbones_are_fetched(bundle_root):
    with pytest.raises(ConfigError, match="'nano' backbone has no SAM 2.1 checkpoint"):
        fetch_checkpoint("nano", bundle_root)
    with pytest.raises(WeightsError, match=r"expected an entry with path sam2\.1_hiera_large\.pt"):
        fetch_checkpoint("large", bundle_root)
    list_file(bundle_root, "http://127.0.0.1/", "")
    with pytest.raises(WeightsError, match="hash_val"):
        fetch_checkpoint("tiny", bundle_root)


@pytest.fixture(scope="module")
def tiny_state(tiny_checkpoint):
    return torch.load(tiny_checkpoint, weights_only=True)["model"]


@pytest.mark.parametrize("form", ["plain.pt", "legacy.pt", "half.safetensors"])
def test_a_checkpoint_may_be_plain_old_or_safetensors(tiny_state, tiny_model, tmp_path, form):
    path, state = tmp_path / form, tiny_state
    if form == "half.safetensors":
        state = {key: value.half() for key, value in state.items()}
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "plain.pt")
    torch.nn.init.zeros_(tiny_model.no_mem_embed)
    load_sam2_checkpoint(tiny_model, path, "tiny")
    assert all(torch.equal(value, state[key].float()) for key, value in tiny_model.state_dict().items())


def test_a_checkpoint_of_another_backbone_names_its_overlay(tiny_checkpoint):
    with pytest.raises(WeightsError) as error:
        SAM2SGP("small", 64, tiny_checkpoint)
    message = str(error.value)
    assert str(tiny_checkpoint) in message
    assert "belongs to configs/backbones/tiny.json: use that overlay, or the file of 'small'" in message
    first = "image_encoder.trunk.blocks.10.attn.qkv.weight is (2304, 384) in the file, (1152, 384) in the network"
    assert f"the first: {first}." in message


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "no_mem_embed"), r"1 differences; the first: no_mem_embed is missing.*no whole SAM 2\.1"),
        (lambda s: {**s, "extra": s["no_mem_embed"]}, r"1 differences; the first: extra in the file is unknown"),
        (
            lambda s: {**s, "no_mem_embed": torch.zeros(1, 1, 8)},
            r"no_mem_embed is \(1, 1, 8\) in the file, \(1, 1, 256\)",
        ),
        (
            lambda s: without(s, "no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"),
            r"3 differences.*older SAM 2\.0 checkpoint of configs/backbones/tiny\.json.*sam2\.1_hiera_tiny\.pt",
        ),
        (lambda s: {"weight": torch.zeros(1)}, r"no SAM 2\.1 checkpoint of any backbone"),
    ],
)
def test_a_checkpoint_is_loaded_strictly(tiny_state, tiny_model, tmp_path, change, message):
    torch.save({"model": change(tiny_state)}, tmp_path / "changed.pt")
    before = tiny_model.no_mem_embed.clone()
    with pytest.raises(WeightsError, match=rf"changed\.pt: does not fit the 'tiny' network, .*{message}"):
        load_sam2_checkpoint(tiny_model, tmp_path / "changed.pt", "tiny")
    assert torch.equal(tiny_model.no_mem_embed, before)


def test_network_weights_are_recognised_where_a_checkpoint_is_expected(tiny_model, tmp_path):
    save_weights(SAM2SGP("nano", 64, lora={"r": 2, "alpha": 2}), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"SAM2SGP network of configs/backbones/nano\.json.*`load_weights`"):
        load_sam2_checkpoint(tiny_model, tmp_path / "model.pt", "tiny")


def test_a_missing_checkpoint_says_how_to_get_it(tmp_path):
    with pytest.raises(WeightsError, match=r"fetch_checkpoint\('tiny'.*monai\.bundle download_large_files"):
        SAM2SGP("tiny", 64, tmp_path / "none.pt")


def test_every_checkpoint_of_a_backbone_is_listed_in_the_bundle():
    listing = Path(__file__).parents[2] / "bundle" / LISTING
    for definition in BACKBONES.values():
        if definition.checkpoint:
            assert f'"{definition.checkpoint}"' in listing.read_text()
