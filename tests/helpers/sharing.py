"""What each of several processes reads and encodes of one support set, and adapts to it: started by `torchrun`.

Arguments: the folder of the support set, the cache folder, and the folder for adaptations and `<rank>.json`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from monai.transforms import Compose

from sam2sgp.adaptation import support_adaptation
from sam2sgp.data import load_datalist
from sam2sgp.engines import adapted
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.support import TensorStore, shared_support_bank
from sam2sgp.transforms import LoadCased
from tests.helpers.pairs import NAMES, Counter, network, preprocessing


class CountedLoad(LoadCased):
    calls = 0

    def __call__(self, data):
        CountedLoad.calls += 1
        return super().__call__(data)


def main(folder: str, cache: str, output: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    net = network()
    net.encode = encoded = Counter(net.encode)
    bank = shared_support_bank(
        load_datalist(folder),
        store=TensorStore(cache),
        transform=Compose([CountedLoad(), *preprocessing().transforms[1:]]),
        class_names=NAMES,
        progress=False,
    )
    inferer = SupportSetInferer(bank)
    inferer.encode(net)
    found = {"read": CountedLoad.calls, "encoded": encoded.calls, "embedding": bank.embedding.tolist()}
    inferer.reset()
    support_adaptation.AdaptationRun = runs = Counter(support_adaptation.AdaptationRun)
    made = support_adaptation.SupportAdaptation(0, max_steps=1, cache_dir=Path(output, "adaptation"), progress=False)
    inferer = adapted(inferer, network(), made)
    found |= {"adapted": runs.calls, "adaptation": asdict(inferer.adaptation.record)}
    Path(output, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
