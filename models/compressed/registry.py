"""The embedding methods by name, in the order in which they are shown; a method is registered in one line."""

from models.compressed.hashed.adaptive import Adaptive
from models.compressed.hashed.bloom import Bloom
from models.compressed.hashed.cce import Clustered
from models.compressed.hashed.dhe import DeepHash
from models.compressed.hashed.hash_embeddings import HashEmbeddings
from models.compressed.hashed.multihash import MultiHash
from models.compressed.hashed.per_field import Hashing
from models.compressed.hashed.quotient_remainder import QuotientRemainder
from models.compressed.hashed.robe import HashedNet, Robe
from models.compressed.hashed.shared import SharedHashing
from models.compressed.hashed.tensor_train import TensorTrain
from models.compressed.hashed.unified import Unified, UnifiedOneLookup
from models.compressed.method import EmbeddingMethod
from models.compressed.stored.alpt import Alpt
from models.compressed.stored.collisionless import Collisionless
from models.compressed.stored.deeplight import DeepLight
from models.compressed.stored.mixed_dimensions import MixedDimensions
from models.compressed.stored.product_quantized import MultiGranular, ProductQuantized
from models.compressed.stored.quantized import Int8, Int16

FAMILIES: dict[str, tuple[type[EmbeddingMethod], ...]] = {
    "rows by hash": (Hashing, SharedHashing, UnifiedOneLookup, Unified, MultiHash, Bloom, HashEmbeddings),
    "rows composed or computed": (QuotientRemainder, Robe, HashedNet, TensorTrain, DeepHash, Clustered),
    "more for some values": (Collisionless, MixedDimensions, Adaptive, DeepLight),
    "fewer bits": (ProductQuantized, MultiGranular, Int8, Int16, Alpt),
}

METHODS: dict[str, type[EmbeddingMethod]] = {method.name: method for methods in FAMILIES.values() for method in methods}
