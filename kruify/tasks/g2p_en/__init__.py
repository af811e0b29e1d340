"""g2p-en: English spelling to pronunciation, the published GRU encoder-decoder of the package g2p-en with CMUdict."""

from kruify.tasks.g2p_en.model import G2PNetwork
from kruify.tasks.g2p_en.task import G2PEn

__all__ = ["G2PEn", "G2PNetwork"]
