//! The methods that are offered, by path. All others are UNIMPLEMENTED.

pub(in crate::http) const SERVER_LIVE: &str = "/inference.GRPCInferenceService/ServerLive";
pub(in crate::http) const SERVER_READY: &str = "/inference.GRPCInferenceService/ServerReady";
pub(in crate::http) const MODEL_READY: &str = "/inference.GRPCInferenceService/ModelReady";
pub(in crate::http) const SERVER_METADATA: &str = "/inference.GRPCInferenceService/ServerMetadata";
pub(in crate::http) const MODEL_METADATA: &str = "/inference.GRPCInferenceService/ModelMetadata";
pub(in crate::http) const MODEL_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
pub(in crate::http) const INDEX: &str = "/inference.GRPCInferenceService/RepositoryIndex";
pub(in crate::http) const LOAD: &str = "/inference.GRPCInferenceService/RepositoryModelLoad";
pub(in crate::http) const UNLOAD: &str = "/inference.GRPCInferenceService/RepositoryModelUnload";
pub(in crate::http) const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// All of them.
pub(in crate::http) const ALL: [&str; 10] = [
    SERVER_LIVE,
    SERVER_READY,
    MODEL_READY,
    SERVER_METADATA,
    MODEL_METADATA,
    MODEL_INFER,
    INDEX,
    LOAD,
    UNLOAD,
    HEALTH,
];

/// Those that want an administrator's key.
pub(in crate::http) const FOR_ADMINISTRATORS: [&str; 2] = [LOAD, UNLOAD];

/// What a body is declared as.
pub(in crate::http) const MEDIA_TYPES: [&str; 2] = ["application/grpc", "application/grpc+proto"];
