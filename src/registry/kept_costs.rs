//! What evaluations cost, kept over restarts: measuring it takes seconds, in which a server that starts is not ready.

use std::{
    fs,
    hash::Hasher,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use siphasher::sip::SipHasher13;
use understudy_models::{
    checkpoint::{ModelFolder, write_atomically},
    quantization::dtype_name,
};

use crate::engine::{CostModel, StageCosts};

/// Bytes of a file of costs, at most; what is longer is none.
const MOST_BYTES: u64 = 1 << 16;

/// Where costs are kept, if anywhere.
#[derive(Debug, Clone, Default)]
pub struct KeptCosts {
    folder: Option<PathBuf>,
}

/// What the time of a model's evaluations depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Circumstances {
    networks: Value,
    dtype: String,
    max_rows: Option<usize>,
    processor: String,
    threads: usize,
    build: Build,
}

/// The program: its kernels decide, and those change with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Build {
    bytes: u64,
    modified_nanoseconds: u64,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    circumstances: Circumstances,
    costs: StageCosts,
}

impl KeptCosts {
    /// A file per model in `folder`, which is made when there is something to keep.
    pub fn in_folder(folder: PathBuf) -> Self {
        Self { folder: Some(folder) }
    }

    /// The circumstances of a model on these devices. Nothing where costs are not kept: on GPUs, which compile and
    /// choose anew whenever a server starts, so that there would be little to gain.
    pub(super) fn circumstances(
        &self,
        model: &ModelFolder,
        dtype: DType,
        max_rows: Option<usize>,
        devices: &[Device],
    ) -> Option<Circumstances> {
        self.folder.as_ref()?;
        if !devices.iter().all(Device::is_cpu) {
            return None;
        }
        Some(Circumstances {
            networks: json!([
                model.network.to_json(),
                model.guide().map(|(guide, _)| guide.network.to_json()),
                model.autoencoder.as_ref().map(|part| part.config.to_json()),
                model.text_encoders.iter().map(|part| &part.encoder.config).collect::<Vec<_>>(),
            ]),
            dtype: dtype_name(dtype).to_owned(),
            max_rows,
            processor: processor(),
            threads: rayon::current_num_threads(),
            build: Build::running()?,
        })
    }

    /// What was measured under the same circumstances, as far as it is there and makes sense.
    pub(super) fn recall(&self, circumstances: &Circumstances) -> StageCosts {
        let kept = || -> Option<Kept> {
            let path = circumstances.file(self.folder.as_deref()?);
            if fs::metadata(&path).ok()?.len() > MOST_BYTES {
                return None;
            }
            serde_json::from_slice(&fs::read(path).ok()?).ok()
        };
        let kept = kept().filter(|kept| kept.circumstances == *circumstances);
        let plausible = kept.filter(|kept| {
            kept.costs.iter().all(|(_, costs)| costs.as_ref().is_none_or(CostModel::is_plausible))
        });
        plausible.map(|kept| kept.costs).unwrap_or_default()
    }

    /// Keeps what was measured. Whoever cannot measures again the next time.
    pub(super) fn keep(&self, circumstances: Circumstances, costs: StageCosts) {
        let Some(folder) = &self.folder else { return };
        let path = circumstances.file(folder);
        let kept = json!(Kept { circumstances, costs }).to_string();
        let written = fs::create_dir_all(folder).map_err(|error| error.to_string());
        let written = written.and_then(|()| {
            write_atomically(&path, kept.as_bytes()).map_err(|error| error.to_string())
        });
        if let Err(problem) = written {
            tracing::debug!(path = %path.display(), problem, "costs are not kept");
        }
    }
}

impl Circumstances {
    /// Another build's costs are written over, so the build is no part of the name.
    fn file(&self, folder: &Path) -> PathBuf {
        let Self { networks, dtype, max_rows, processor, threads, build: _ } = self;
        let named = json!([networks, dtype, max_rows, processor, threads]).to_string();
        let mut hash = SipHasher13::new();
        hash.write(named.as_bytes());
        folder.join(format!("{:016x}.json", hash.finish()))
    }
}

impl Build {
    fn running() -> Option<Self> {
        let file = fs::metadata(std::env::current_exe().ok()?).ok()?;
        let modified = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(Self {
            bytes: file.len(),
            modified_nanoseconds: u64::try_from(modified.as_nanos()).ok()?,
        })
    }
}

/// The processor's name where the system tells it, else its architecture.
fn processor() -> String {
    let told = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = told.lines().find_map(|line| line.strip_prefix("model name"));
    let name = named.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::stage::{PerStage, Stage};

    fn model() -> ModelFolder {
        let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/fashion-mnist-student");
        ModelFolder::open(&zoo).unwrap()
    }

    fn costs() -> StageCosts {
        let costs = || CostModel::new(vec![(1, 0.001), (2, 0.0015)], None);
        PerStage::new(|stage| (stage == Stage::Denoise).then(costs))
    }

    #[test]
    fn costs_are_known_again_under_the_same_circumstances_only() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptCosts::in_folder(folder.path().join("deeper"));
        let of = |dtype, rows| kept.circumstances(&model(), dtype, rows, &[Device::Cpu]).unwrap();
        let here = of(DType::F32, None);
        assert_eq!(kept.recall(&here), StageCosts::default());
        kept.keep(here.clone(), costs());
        assert_eq!(kept.recall(&here), costs());
        assert_eq!(kept.recall(&of(DType::BF16, None)), StageCosts::default());
        assert_eq!(kept.recall(&of(DType::F32, Some(4))), StageCosts::default());
        let mut rebuilt = here.clone();
        rebuilt.build.bytes += 1;
        assert_eq!(kept.recall(&rebuilt), StageCosts::default(), "another build");
        kept.keep(rebuilt.clone(), costs());
        assert_eq!(
            kept.recall(&here),
            StageCosts::default(),
            "and its costs take the place of the old one's"
        );
        assert_eq!(fs::read_dir(folder.path().join("deeper")).unwrap().count(), 1);
    }

    #[test]
    fn files_that_make_no_sense_are_as_if_they_were_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptCosts::in_folder(folder.path().into());
        let here = kept.circumstances(&model(), DType::F32, None, &[Device::Cpu]).unwrap();
        kept.keep(here.clone(), costs());
        let file = here.file(folder.path());
        let good = fs::read_to_string(&file).unwrap();
        for bad in [
            "",
            "{}",
            &good[..good.len() / 2],
            &good.replace("[1,0.001]", "[3,0.001]"),
            &good.replace("[1,0.001]", "[1,-1.0]"),
            &good.replace("[[1,0.001],[2,0.0015]]", "[]"),
            &good.replace("\"max_rows\":2", "\"max_rows\":0"),
            &format!("{good}{}", " ".repeat(1 << 16)),
        ] {
            assert_ne!(bad, good);
            fs::write(&file, bad).unwrap();
            assert_eq!(kept.recall(&here), StageCosts::default(), "{bad}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_keeps_nothing_and_harms_nobody() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let kept = KeptCosts::in_folder(file.path().join("below"));
        let here = kept.circumstances(&model(), DType::F32, None, &[Device::Cpu]).unwrap();
        kept.keep(here.clone(), costs());
        assert_eq!(kept.recall(&here), StageCosts::default());
        assert!(KeptCosts::default().circumstances(&model(), DType::F32, None, &[]).is_none());
    }
}
