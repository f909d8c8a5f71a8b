//! Writes the Rust of the protocol files in `src/http/grpc/wire`; with `--check` it compares instead.
//!
//!     cargo run --manifest-path tools/protobuf/Cargo.toml [-- --check]

use std::{error::Error, fs, path::Path, process::ExitCode};

const BEGINS: &str = "// Generated from the protocol file beside it by tools/protobuf.\n";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let check = std::env::args().nth(1).as_deref() == Some("--check");
    let wire = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src/http/grpc/wire");
    for name in ["open_inference", "health"] {
        let descriptors = protox::compile([format!("{name}.proto")], [&wire])?;
        let mut config = prost_build::Config::new();
        // Tensors are slices of the message that brings them.
        config.bytes(["."]);
        let modules = descriptors
            .file
            .into_iter()
            .map(|file| (prost_build::Module::from_protobuf_package_name(file.package()), file));
        let generated = config.generate(modules.collect())?;
        let code: String = generated.into_values().collect();
        let (code, path) = (format!("{BEGINS}{code}"), wire.join(name).with_extension("rs"));
        if !check {
            fs::write(path, code)?;
        } else if fs::read_to_string(&path)? != code {
            eprintln!("{name}.rs is not what {name}.proto says; run this without --check");
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}
