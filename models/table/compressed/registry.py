"""The embedding methods by name, in the order in which they are shown; one line registers another."""

from models.table.compressed.adaptive import Adaptive
from models.table.compressed.alpt import Alpt
from models.table.compressed.bloom import Bloom
from models.table.compressed.cce import Clustered
from models.table.compressed.collisionless import Collisionless
from models.table.compressed.deeplight import DeepLight
from models.table.compressed.dhe import DeepHash
from models.table.compressed.hash_embeddings import HashEmbeddings
from models.table.compressed.hashing import Hashing
from models.table.compressed.method import EmbeddingMethod
from models.table.compressed.mixed_dimensions import MixedDimensions
from models.table.compressed.multihash import MultiHash
from models.table.compressed.product_quantized import MultiGranular, ProductQuantized
from models.table.compressed.quantized import Int8, Int16
from models.table.compressed.quotient_remainder import QuotientRemainder
from models.table.compressed.robe import HashedNet, Robe
from models.table.compressed.shared_hashing import SharedHashing
from models.table.compressed.tensor_train import TensorTrain
from models.table.compressed.unified import Unified, UnifiedOneLookup

FAMILIES: dict[str, tuple[type[EmbeddingMethod], ...]] = {
    "rows by hash": (Hashing, SharedHashing, UnifiedOneLookup, Unified, MultiHash, Bloom, HashEmbeddings),
    "rows composed or computed": (QuotientRemainder, Robe, HashedNet, TensorTrain, DeepHash, Clustered),
    "more for some values": (Collisionless, MixedDimensions, Adaptive, DeepLight),
    "fewer bits": (ProductQuantized, MultiGranular, Int8, Int16, Alpt),
}

METHODS: dict[str, type[EmbeddingMethod]] = {method.name: method for methods in FAMILIES.values() for method in methods}
