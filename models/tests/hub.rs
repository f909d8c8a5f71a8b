//! Hub ids against a local server with the Hub's URL shape.
#![allow(clippy::unwrap_used)]

mod hub_server;

use std::{fs, net::TcpListener, path::Path, time::Duration};

use candle_core::{DType, Device};
use hub_server::HubServer;
use tempfile::TempDir;
use understudy_models::checkpoint::{
    ModelFolder,
    hub::{Hub, id_of, resolve},
};

const ID: &str = "somebody/clothes";
const PATIENCE: Duration = Duration::from_secs(20);
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

/// The bundled teacher's files, by their names in a repository.
fn teacher() -> Vec<(String, Vec<u8>)> {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo/fashion-mnist-teacher");
    let names = ["model_index.json", "unet/config.json", WEIGHTS, "understudy.json"];
    let names = names.into_iter().chain(["scheduler/scheduler_config.json"]);
    names.map(|name| (name.to_owned(), fs::read(zoo.join(name)).expect("zoo file"))).collect()
}

/// `from` called `to`.
fn renamed(mut files: Vec<(String, Vec<u8>)>, from: &str, to: &str) -> Vec<(String, Vec<u8>)> {
    files.iter_mut().filter(|(name, _)| name == from).for_each(|(name, _)| *name = to.to_owned());
    files
}

fn hub(server: &HubServer, home: &TempDir) -> Hub {
    Hub::new(&server.endpoint, home.path(), None, PATIENCE)
}

fn problem(server: &HubServer, home: &TempDir) -> String {
    let problem = hub(server, home).fetch(ID).expect_err("must fail").to_string();
    assert!(problem.contains(ID), "{problem}");
    problem
}

#[test]
fn repository_becomes_a_model_folder() {
    let (server, home) = (HubServer::new(ID, teacher()), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    let opened = ModelFolder::open(&folder).unwrap();
    assert_eq!(opened.card.class_names.len(), 10);
    for (name, bytes) in teacher() {
        assert_eq!(fs::read(folder.join(&name)).unwrap(), bytes, "{name}");
    }
    assert!(folder.starts_with(home.path().join("hub/models--somebody--clothes/snapshots")));
}

#[test]
fn second_call_needs_no_network() {
    let (server, home) = (HubServer::new(ID, teacher()), TempDir::new().unwrap());
    let hub = hub(&server, &home);
    let first = hub.fetch(ID).unwrap();
    drop(server);
    assert_eq!(hub.fetch(ID).unwrap(), first);
}

#[test]
fn only_what_serving_reads_is_downloaded() {
    let mut files = teacher();
    for name in ["README.md", "unet/diffusion_pytorch_model.bin", "vae/config.json"] {
        files.push((name.to_owned(), b"not asked for".to_vec()));
    }
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    for name in ["README.md", "unet/diffusion_pytorch_model.bin", "vae"] {
        assert!(!folder.join(name).exists(), "{name}");
    }
}

/// A text-to-image model is fetched with all that it is run with, and without what it is not.
#[test]
fn the_parts_around_a_network_are_fetched() {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pipeline/stable_diffusion");
    let mut files = Vec::new();
    for name in [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ] {
        files.push((name.to_owned(), fs::read(golden.join(name)).unwrap()));
    }
    let named = files.clone();
    // Published with a variant beside it, and a safety checker.
    files.push(("unet/diffusion_pytorch_model.fp16.safetensors".into(), b"not asked for".to_vec()));
    files.push(("safety_checker/model.safetensors".into(), b"not asked for".to_vec()));
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    for (name, bytes) in named {
        assert_eq!(fs::read(folder.join(&name)).unwrap(), bytes, "{name}");
    }
    assert!(!folder.join("unet/diffusion_pytorch_model.fp16.safetensors").exists());
    assert!(!folder.join("safety_checker").exists());
    ModelFolder::open(&folder).unwrap().load(DType::F32, &Device::Cpu).unwrap();
}

#[test]
fn what_a_card_names_and_codes_of_8_bits_are_fetched() {
    let mut files = teacher();
    for (name, bytes) in &mut files {
        if name == "understudy.json" {
            let mut card: serde_json::Value = serde_json::from_slice(bytes).unwrap();
            card["autoguidance"] = serde_json::json!({ "scale": 2 });
            *bytes = card.to_string().into();
        }
    }
    let student = Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo/fashion-mnist-student");
    let guide: Vec<_> = teacher()
        .into_iter()
        .map(|(name, _)| (format!("guide/{name}"), fs::read(student.join(name)).unwrap()))
        .collect();
    files.extend(guide.clone());
    files.push(("guide/notes.txt".into(), b"not asked for".to_vec()));
    let codes = ("unet/quantization.safetensors".to_owned(), b"codes".to_vec());
    files.push(codes.clone());
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    for (name, bytes) in guide.iter().chain([&codes]) {
        assert_eq!(fs::read(folder.join(name)).unwrap(), *bytes, "{name}");
    }
    assert!(!folder.join("guide/notes.txt").exists());
    assert!(ModelFolder::open(&folder).unwrap().guide().is_some());
}

#[test]
fn flat_layout_of_early_repositories() {
    let mut files = teacher();
    for (name, _) in &mut files {
        *name = name.rsplit('/').next().unwrap().to_owned();
    }
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    let weights = ModelFolder::open(&folder).unwrap().weight_files().unwrap();
    assert_eq!(weights, [folder.join("diffusion_pytorch_model.safetensors")]);
    assert!(weights[0].is_file());
}

/// A transformer's files lie in a folder of their own.
#[test]
fn transformer_becomes_a_model_folder() {
    let component = ["diffusers", "DiTTransformer2DModel"];
    let index = serde_json::json!({"_class_name": "DiTPipeline", "transformer": component});
    let config = r#"{"_class_name": "DiTTransformer2DModel"}"#;
    let scheduler = r#"{"_class_name": "DDIMScheduler"}"#;
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    let files = [
        ("model_index.json", index.to_string()),
        ("transformer/config.json", config.into()),
        ("scheduler/scheduler_config.json", scheduler.into()),
        (weights, "weights".into()),
        ("vae/config.json", "not asked for".into()),
    ];
    let files = files.map(|(name, text)| (name.to_owned(), text.into_bytes())).to_vec();
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    assert_eq!(ModelFolder::open(&folder).unwrap().network.component(), "transformer");
    assert!(folder.join(weights).is_file() && !folder.join("vae").exists());
}

#[test]
fn sharded_weights() {
    let shards = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"];
    let mut files = renamed(teacher(), WEIGHTS, &format!("unet/{}", shards[0]));
    files.push((format!("unet/{}", shards[1]), b"shard".to_vec()));
    let index = format!(r#"{{"weight_map": {{"a": "{}", "b": "{}"}}}}"#, shards[0], shards[1]);
    files.push((format!("{WEIGHTS}.index.json"), index.into_bytes()));
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let hub = hub(&server, &home);
    let folder = hub.fetch(ID).unwrap();
    assert!(shards.iter().all(|shard| folder.join("unet").join(shard).is_file()));

    fs::remove_file(folder.join("unet").join(shards[1])).unwrap();
    assert_eq!(hub.fetch(ID).unwrap(), folder, "an incomplete snapshot is completed");
    assert!(folder.join("unet").join(shards[1]).is_file());
}

#[test]
fn unknown_repository_is_told_with_its_status() {
    let (server, home) = (HubServer::new("somebody/else", teacher()), TempDir::new().unwrap());
    let problem = problem(&server, &home);
    assert!(problem.contains("HTTP 404") && problem.contains("spelling"), "{problem}");
}

#[test]
fn private_repository_opens_with_its_token() {
    let server = HubServer::new(ID, teacher()).with_token("secret");
    let home = TempDir::new().unwrap();
    let problem = problem(&server, &home);
    assert!(problem.contains("HTTP 401") && problem.contains("HF_TOKEN"), "{problem}");
    Hub::new(&server.endpoint, home.path(), Some("secret".into()), PATIENCE).fetch(ID).unwrap();
}

/// The files of a golden folder, by their names in a repository.
fn golden(folder: &str) -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pipeline").join(folder);
    let mut files = Vec::new();
    for place in ["", "unet/", "scheduler/"] {
        for entry in fs::read_dir(root.join(place)).unwrap() {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
            if path.is_file() {
                files.push((format!("{place}{}", name.to_str().unwrap()), fs::read(path).unwrap()));
            }
        }
    }
    files
}

/// What `torch.save` wrote, whole or in shards, is fetched where there is nothing better.
#[test]
fn weights_of_torch_save_are_fetched_where_there_are_no_others() {
    let tensors = |folder: &Path| ModelFolder::open(folder).unwrap().tensors().unwrap();
    let [whole, bin, sharded] = ["forms/whole", "forms/bin", "forms/bin_sharded"].map(|form| {
        let (server, home) = (HubServer::new(ID, golden(form)), TempDir::new().unwrap());
        let folder = hub(&server, &home).fetch(ID).unwrap();
        for (name, bytes) in golden(form) {
            assert_eq!(fs::read(folder.join(&name)).unwrap(), bytes, "{name}");
        }
        let again = hub(&server, &home).fetch(ID).unwrap();
        assert_eq!(again, folder);
        tensors(&folder)
    });
    assert!(whole.len() > 10);
    for other in [bin, sharded] {
        assert_eq!(other.len(), whole.len());
        for (name, tensor) in &whole {
            let values = |it: &candle_core::Tensor| it.flatten_all().unwrap().to_vec1::<f32>();
            assert_eq!(values(tensor).unwrap(), values(&other[name]).unwrap(), "{name}");
        }
    }
}

/// Of a text encoder, whose file is called otherwise; a variant of safetensors is better than that.
#[test]
fn each_part_is_fetched_in_the_best_form_that_it_has() {
    let text = "text_encoder/pytorch_model.bin";
    let variant = "unet/diffusion_pytorch_model.fp16.safetensors";
    let mut files = vec![(text.to_owned(), b"weights".to_vec())];
    files.push((variant.to_owned(), b"weights".to_vec()));
    files.push(("unet/diffusion_pytorch_model.bin".into(), b"not asked for".to_vec()));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pipeline/stable_diffusion");
    for name in [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ] {
        files.push((name.to_owned(), fs::read(root.join(name)).unwrap()));
    }
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let folder = hub(&server, &home).fetch(ID).unwrap();
    assert!(folder.join(text).is_file() && folder.join(variant).is_file());
    assert!(!folder.join("unet/diffusion_pytorch_model.bin").exists());
}

#[test]
fn weights_of_other_forms_are_refused_by_name() {
    let ckpt = "unet/model.ckpt";
    let server = HubServer::new(ID, renamed(teacher(), WEIGHTS, ckpt));
    let home = TempDir::new().unwrap();
    let problem = problem(&server, &home);
    assert!(problem.contains(ckpt) && problem.contains("save_pretrained"), "{problem}");
    assert!(problem.contains("no unet/diffusion_pytorch_model.bin"), "{problem}");
}

#[test]
fn repository_without_a_pipeline_is_refused() {
    let server = HubServer::new(ID, renamed(teacher(), "model_index.json", "index.json"));
    let problem = problem(&server, &TempDir::new().unwrap());
    assert!(problem.contains("model_index.json"), "{problem}");
}

#[test]
fn weights_of_a_model_that_cannot_be_served_are_not_downloaded() {
    let mut files = teacher();
    let index = &mut files.iter_mut().find(|(name, _)| name == "model_index.json").unwrap().1;
    *index = br#"{"unet": ["diffusers", "UNet3DConditionModel"]}"#.to_vec();
    let (server, home) = (HubServer::new(ID, files), TempDir::new().unwrap());
    let problem = hub(&server, &home).fetch(ID).unwrap_err().to_string();
    assert!(problem.contains("UNet3DConditionModel"), "{problem}");
    assert!(!server.requests().iter().any(|path| path.contains("safetensors")));
}

#[test]
fn interrupted_download_says_so_and_goes_on_from_there() {
    let server = HubServer::new(ID, teacher());
    let home = TempDir::new().unwrap();
    server.cut_short(Some(1_000_000));
    let problem = problem(&server, &home);
    assert!(problem.contains(WEIGHTS) && problem.contains("run it again"), "{problem}");

    server.cut_short(None);
    let folder = hub(&server, &home).fetch(ID).unwrap();
    let weights = &teacher()[2].1;
    assert!(fs::read(folder.join(WEIGHTS)).unwrap() == *weights);
    assert!(server.requests().iter().any(|line| line.contains("bytes=1000000-")));
}

#[test]
fn file_shorter_than_listed_does_not_stay_in_the_cache() {
    let server = HubServer::new(ID, teacher());
    let home = TempDir::new().unwrap();
    server.shrink(true);
    let problem = problem(&server, &home);
    assert!(problem.contains("bytes came"), "{problem}");

    server.shrink(false);
    let folder = hub(&server, &home).fetch(ID).unwrap();
    assert!(fs::read(folder.join(WEIGHTS)).unwrap() == teacher()[2].1);
}

#[test]
fn no_answer_names_the_endpoint() {
    let home = TempDir::new().unwrap();
    let hub = Hub::new("http://127.0.0.1:9", home.path(), None, PATIENCE);
    let problem = hub.fetch(ID).unwrap_err().to_string();
    assert!(problem.contains("http://127.0.0.1:9") && problem.contains("HF_ENDPOINT"), "{problem}");
}

#[test]
fn model_is_a_folder_or_a_name_inside_the_models_folder() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo");
    let teacher = zoo.join("fashion-mnist-teacher");
    assert_eq!(resolve("fashion-mnist-teacher", &[Path::new("nowhere"), &zoo]).unwrap(), teacher);
    assert_eq!(resolve(teacher.to_str().unwrap(), &[]).unwrap(), teacher);
    let problem = resolve("no-such-model", &[&zoo]).unwrap_err().to_string();
    assert!(problem.contains("no-such-model") && problem.contains("owner/name"), "{problem}");
    assert!(resolve("../zoo", &[&zoo]).is_err());
}

#[test]
fn hub_model_serves_under_an_id_without_a_slash() {
    assert_eq!(id_of("google/ddpm-cifar10-32"), "google--ddpm-cifar10-32");
    assert_eq!(id_of("fashion-mnist-teacher"), "fashion-mnist-teacher");
}

/// Accepts connections and says nothing.
#[test]
fn a_silent_hub_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let home = TempDir::new().unwrap();
    let hub = Hub::new(&endpoint, home.path(), None, Duration::from_millis(50));
    let problem = hub.fetch(ID).unwrap_err().to_string();
    assert!(problem.contains("silent") && problem.contains(&endpoint), "{problem}");
    assert!(problem.contains("HF_HUB_DOWNLOAD_TIMEOUT"), "{problem}");
}

#[test]
fn a_file_that_stops_coming_is_given_up_and_goes_on_from_there() {
    let (server, home) = (HubServer::new(ID, teacher()), TempDir::new().unwrap());
    server.stall(Some(1_000_000));
    let hub = Hub::new(&server.endpoint, home.path(), None, Duration::from_millis(200));
    let problem = hub.fetch(ID).unwrap_err().to_string();
    assert!(problem.contains(WEIGHTS) && problem.contains("goes on from there"), "{problem}");
    server.stall(None);
    let folder = hub.fetch(ID).unwrap();
    assert!(fs::read(folder.join(WEIGHTS)).unwrap() == teacher()[2].1);
    assert!(server.requests().iter().any(|line| line.contains("bytes=1000000-")));
}

/// Nothing that a Hub says becomes a path outside of the cache.
#[test]
fn answers_that_lead_elsewhere_are_refused() {
    let outside = "../../../../outside";
    let listing = |sha: &str, name: &str| {
        format!(r#"{{"sha": "{sha}", "siblings": [{{"rfilename": "{name}", "size": 2}}]}}"#)
    };
    let sha = "0123456789abcdef0123456789abcdef01234567";
    for (answer, part) in [
        (listing(outside, "model_index.json"), "40 hexadecimal digits"),
        (listing("", "model_index.json"), "40 hexadecimal digits"),
        (listing(sha, outside), "no file inside"),
        (listing(sha, "/etc/passwd"), "no file inside"),
        (listing(sha, "unet/../../x"), "no file inside"),
        ("[]".into(), "none that a Hub gives"),
        ("{".into(), "none that a Hub gives"),
    ] {
        let (server, home) = (HubServer::new(ID, teacher()), TempDir::new().unwrap());
        server.list(&answer);
        let problem = problem(&server, &home);
        assert!(problem.contains(part), "{answer}: {problem}");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "{answer}");
    }
}

#[test]
fn a_name_of_content_that_leads_elsewhere_is_refused() {
    let (server, home) = (HubServer::new(ID, teacher()), TempDir::new().unwrap());
    server.name_contents("../../../outside");
    let problem = problem(&server, &home);
    assert!(problem.contains("etag"), "{problem}");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn a_file_longer_than_announced_is_refused() {
    let (server, home) = (HubServer::new(ID, teacher()), TempDir::new().unwrap());
    let lists = teacher()
        .into_iter()
        .map(|(name, bytes)| format!(r#"{{"rfilename": "{name}", "size": {}}}"#, bytes.len() - 1));
    let lists: Vec<String> = lists.collect();
    server.list(&format!(
        r#"{{"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": [{}]}}"#,
        lists.join(",")
    ));
    let problem = problem(&server, &home);
    assert!(problem.contains("model_index.json") && problem.contains("announced"), "{problem}");
}
